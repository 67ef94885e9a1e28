"""Compares a robust source with its standard twin for detection or segmentation, over several seeds.

    python -m tests.bench.dense_transfer --flagfile=configs/scenes_detection.cfg --seeds=0,1,2 [--at_once=2]

For each seed it runs the job of the flag file from both sources, and then `robust_tf.evaluate` on both networks, on the
same test images. The seed decides the images of --subset, their order and the initial weights of the head. Finished
jobs and evaluations are not run again. Each line gives the mean over the seeds with its 95 % t-interval; the
differences are paired by seed. The intervals of one pair of networks, over test images, are in its evaluation.json.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from robust_tf.config.job import read_flag_file
from robust_tf.models import standard_twin
from tests.bench.robust_transfer import in_words


def main() -> None:
    """Runs the jobs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flagfile", type=pathlib.Path, required=True, help="flag file of the job")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/dense_transfer"), help="folder")
    parser.add_argument("--num_images", type=int, default=300, help="number of test images")
    parser.add_argument("--epsilons", default="0.5", help="radii of the attack, separated by commas")
    parser.add_argument("--at_once", type=int, default=2, help="number of seeds that run side by side")
    parser.add_argument("flags", nargs="*", help="further flags of the job, after --")
    arguments = parser.parse_args()
    source = read_flag_file(arguments.flagfile).transfer.source
    sources = {"robust": source, "standard": standard_twin(source)}
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        found = dict(zip(seeds, pool.map(lambda seed: measured(arguments, sources, seed), seeds), strict=True))
    for position, epsilon in enumerate([0.0, *map(float, arguments.epsilons.split(","))]):
        name = found[seeds[0]]["networks"][0]["metric"]
        values = [
            {seed: 100 * each["networks"][number]["results"][position]["value"] for seed, each in found.items()}
            for number in range(2)
        ]
        difference = {seed: values[0][seed] - values[1][seed] for seed in seeds}
        print(f"DENSE {name}, {arguments.num_images} images, epsilon {epsilon:g}, in %:")
        for kind, by_seed in zip(sources, values, strict=True):
            print(f"DENSE   {kind} source: {in_words(by_seed)}")
        print(f"DENSE   robust minus standard: {in_words(difference, sign='+')}")


def measured(arguments: argparse.Namespace, sources: dict[str, str], seed: int) -> dict:
    """Runs both jobs of a seed and returns the content of the evaluation that compares them."""
    folder = arguments.workdir / arguments.flagfile.stem / f"seed{seed}"
    networks = []
    for kind, source in sources.items():
        workdir = folder / kind
        flags = [f"--flagfile={arguments.flagfile}", f"--source={source}", f"--seed={seed}", f"--workdir={workdir}"]
        # The evaluation below attacks both networks on the same images.
        run("train", *flags, "--eval_epsilon=0", "--outputs=classifier", *arguments.flags)
        networks.append(workdir / "classifier.keras")
    robust, standard = networks
    flags = [f"--classifier={robust}", f"--compare={standard}", f"--output={folder}", "--num_examples=6"]
    threat = ["--norm=l2", f"--epsilon={arguments.epsilons}", "--attack_steps=10"]
    run("evaluate", *flags, *threat, f"--num_images={arguments.num_images}")
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


def run(program: str, *flags: str) -> None:
    """Runs a program of the package, whose output goes to stderr."""
    subprocess.run([sys.executable, "-m", f"robust_tf.{program}", *flags], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
