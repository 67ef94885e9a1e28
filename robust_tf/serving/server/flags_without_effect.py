"""The flags of `tensorflow_model_server` that this server accepts, so that a command line works, but cannot act on."""

import dataclasses
from typing import Any

from robust_tf.flags import flag, to_text


def _without_effect(reason: str, *, fulfilled: Any = None) -> Any:
    """Declares a flag without effect.

    Args:
        reason: Why it has no effect, for `--help` and for the warning.
        fulfilled: Value that asks for what the server does anyway, so that no warning is needed.
    """
    return flag(None, f"No effect: {reason}.", reason=reason, fulfilled=fulfilled)


_NO_PROFILER = "there is no profiler in this server"
_NO_LITE = "this server runs only the SavedModel"
_OWN_FLAGS = "the settings of this server are its flags, such as --enable_batching and --tensorflow_session_config_file"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlagsWithoutEffect:
    """Flags that only cause a warning, which names the flag and says why it has no effect."""

    enable_profiler: bool | None = _without_effect(_NO_PROFILER, fulfilled=False)
    flush_filesystem_caches: bool | None = _without_effect(
        "the operating system manages the cache of local files", fulfilled=False
    )
    num_tflite_interpreters_per_pool: int | None = _without_effect(_NO_LITE)
    num_tflite_pools: int | None = _without_effect(_NO_LITE)
    platform_config_file: str | None = _without_effect(_OWN_FLAGS, fulfilled="")
    prefer_tflite_model: bool | None = _without_effect(_NO_LITE, fulfilled=False)
    remove_unused_fields_from_bundle_metagraph: bool | None = _without_effect(
        "this server never keeps the fields that it does not use", fulfilled=True
    )
    skip_initialize_tpu: bool | None = _without_effect("this server uses no TPU", fulfilled=False)
    thread_pool_factory_config_file: str | None = _without_effect(
        "models run in the threads of TensorFlow; see --tensorflow_session_parallelism", fulfilled=""
    )
    use_alts_credentials: bool | None = _without_effect(
        "the gRPC port is encrypted only with --ssl_config_file", fulfilled=False
    )
    xla_cpu_compilation_enabled: bool | None = _without_effect("models may always use XLA", fulfilled=True)
    xla_gpu_compilation_enabled: bool | None = _without_effect("models may always use XLA", fulfilled=True)

    def warnings(self) -> list[str]:
        """Returns a line for each flag that asks for something that this server does not do.

        Example:
            >>> FlagsWithoutEffect(enable_profiler=True, xla_cpu_compilation_enabled=True).warnings()
            ['--enable_profiler=true has no effect: there is no profiler in this server']
        """
        given = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return [
            f"--{field.name}={to_text(value)} has no effect: {field.metadata['reason']}"
            for field, value in given
            if value is not None and value != field.metadata["fulfilled"]
        ]
