"""Publishing classifiers as SavedModels, serving them as TensorFlow Serving does, and asking a server.

The packages build on each other in this order, and none imports one further down:

    wire/      what client and server agree on: names of the protocol, and arrays as JSON
    model/     a SavedModel in memory, and the layout of its versions on disk
    publish/   from a classifier to a checked version folder
    server/    the server, with REST, gRPC, versions, batching and metrics
    client/    the client, which uses wire/ only
"""
