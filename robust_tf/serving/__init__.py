"""Publishing classifiers as SavedModels, serving them as TensorFlow Serving does, and sending requests to a server.

The packages build on each other in this order, and none imports a package that is listed after it:

    wire/      the parts that client and server share: names of the protocol, and arrays as JSON
    model/     a SavedModel in memory, and the layout of its versions on disk
    client/    the client, which uses wire/ only
    artifacts/ runs a SavedModel, an ONNX or LiteRT file, or a model of a server, each in its own runtime
    publish/   turns a classifier into a checked version folder, in any of these formats
    local/     a classifier or an export in this process, with the interface of a client
    server/    the server, with REST, gRPC, versions, batching and metrics; uses wire/ and model/ only
"""
