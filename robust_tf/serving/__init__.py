"""Publishing classifiers as SavedModels, serving them as TensorFlow Serving does, and sending requests to a server.

The packages build on each other in this order, and none imports a package that is listed after it:

    wire/      the parts that client and server share: names of the protocol, and arrays as JSON
    model/     a SavedModel in memory, and the layout of its versions on disk
    publish/   turns a classifier into a checked version folder
    server/    the server, with REST, gRPC, versions, batching and metrics
    client/    the client, which uses wire/ only
"""
