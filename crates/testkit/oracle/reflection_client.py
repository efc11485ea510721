"""A gRPC client that knows nothing but server reflection: lists the services and streams a generation.

usage: reflection_client.py ADDRESS CLIENT_FOLDER MODEL PROMPT

CLIENT_FOLDER is the `client` folder of a node's data directory: node.key and node.crt are the client's own, server.crt is the
certificate of the node it expects. Prints one JSON object.
"""

import json
import pathlib
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


def main(address, folder, model, prompt):
    folder = pathlib.Path(folder)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=(folder / "server.crt").read_bytes(),
        private_key=(folder / "node.key").read_bytes(),
        certificate_chain=(folder / "node.crt").read_bytes(),
    )
    # The certificate's name says nothing about where the node listens; the key is what counts.
    options = [("grpc.ssl_target_name_override", "mlxnode.local")]
    with grpc.secure_channel(address, credentials, options) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = sorted(database.get_services())
        pool = DescriptorPool(database)
        service = pool.FindServiceByName("mlxnode.v1.Inference")
        method = service.FindMethodByName("Generate")
        request_class = GetMessageClass(method.input_type)
        response_class = GetMessageClass(method.output_type)
        generate = channel.unary_stream(
            f"/{service.full_name}/{method.name}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        request = request_class(model=model, max_tokens=32)
        request.chat.messages.add(role="user", content=prompt)
        text, messages, finish = "", 0, None
        for response in generate(request, timeout=60):
            text += response.text
            messages += 1
            if response.HasField("finish"):
                reasons = response.finish.DESCRIPTOR.fields_by_name["reason"].enum_type
                finish = reasons.values_by_number[response.finish.reason].name
        health = pool.FindServiceByName("grpc.health.v1.Health").FindMethodByName("Check")
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=GetMessageClass(health.input_type).SerializeToString,
            response_deserializer=GetMessageClass(health.output_type).FromString,
        )
        serving = check(GetMessageClass(health.input_type)(), timeout=10).status
    print(json.dumps({"services": services, "text": text, "messages": messages, "finish": finish, "serving": serving}))


if __name__ == "__main__":
    main(*sys.argv[1:])
