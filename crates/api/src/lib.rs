//! What clients speak: gRPC services and OpenAI HTTP, limits, keys, the web page.
