//! `Inference` over a [`Front`].

use crate::front::{AnswerEvent, Front, FrontError, Input};
use crate::inference::wire;
use futures::stream::BoxStream;
use mlxnode_compute::TraceContext;
use mlxnode_proto::v1::inference_server::Inference;
use mlxnode_proto::v1::{
    DetokenizeRequest, DetokenizeResponse, GenerateRequest, GenerateResponse, RenderChatRequest,
    RenderChatResponse, TokenizeRequest, TokenizeResponse,
};
use std::time::Instant;
use tonic::{Request, Response, Status};

/// The service on one node.
pub struct InferenceService {
    front: Front,
}

impl InferenceService {
    /// Serves what this front can reach.
    pub fn new(front: Front) -> Self {
        Self { front }
    }
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = BoxStream<'static, Result<GenerateResponse, Status>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let deadline = deadline(&request);
        let trace =
            request.metadata().get("traceparent").and_then(|text| TraceContext::parse(text.to_str().ok()?));
        let request = wire::generation_request(request.into_inner(), deadline, trace)?;
        let mut answer = self.front.generate(request).await.map_err(wire::status)?;
        let front = self.front.clone();
        let stream = async_stream(move |sender| async move {
            let mut prompt_tokens = answer.prompt_tokens as u32;
            while let Some(event) = answer.next().await {
                let message = match event {
                    // Not asked for by this service yet.
                    Ok(AnswerEvent::Prompt(_)) => continue,
                    Ok(AnswerEvent::Piece(piece)) => Ok(wire::response(piece, prompt_tokens)),
                    Ok(AnswerEvent::Ended { piece, summary }) => {
                        let peak = front.peak_memory(&answer.deployment).await;
                        let finish = Some(wire::finish(summary, peak));
                        Ok(GenerateResponse { finish, ..wire::response(piece, prompt_tokens) })
                    }
                    Err(error) => Err(wire::status(error)),
                };
                prompt_tokens = 0; // told once
                if sender.send(message).await.is_err() {
                    return; // the client is gone; dropping the answer cancels the work
                }
            }
        });
        Ok(Response::new(stream))
    }

    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        let request = request.into_inner();
        let deployment = self.front.deployment(&request.model).map_err(wire::status)?;
        let text = self.front.model_text(&deployment).await.map_err(wire::status)?;
        let token_ids = text
            .tokenizer
            .encode(&request.text, !request.no_special_tokens)
            .map_err(|error| wire::status(error.into()))?;
        Ok(Response::new(TokenizeResponse { token_ids }))
    }

    async fn detokenize(
        &self,
        request: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        let request = request.into_inner();
        let deployment = self.front.deployment(&request.model).map_err(wire::status)?;
        let model = self.front.model_text(&deployment).await.map_err(wire::status)?;
        let text = model
            .tokenizer
            .decode(&request.token_ids, false)
            .map_err(|error| wire::status(FrontError::from(error)))?;
        Ok(Response::new(DetokenizeResponse { text }))
    }

    async fn render_chat(
        &self,
        request: Request<RenderChatRequest>,
    ) -> Result<Response<RenderChatResponse>, Status> {
        let request = request.into_inner();
        let chat =
            wire::chat_request(request.chat.ok_or_else(|| Status::invalid_argument("chat is missing"))?)?;
        let deployment = self.front.deployment(&request.model).map_err(wire::status)?;
        let model = self.front.model_text(&deployment).await.map_err(wire::status)?;
        let rendering = tokio::task::spawn_blocking(move || {
            let text = model.render(&chat)?;
            let token_ids = model.tokenize(&Input::Chat(chat))?;
            Ok::<_, FrontError>(RenderChatResponse { text, token_ids })
        });
        let rendered =
            rendering.await.map_err(|error| Status::internal(format!("rendering failed: {error}")))?;
        rendered.map(Response::new).map_err(wire::status)
    }
}

/// Runs a producer in its own task and hands its messages on as a stream. The task ends when the stream is dropped, because
/// its next send fails, and at once when it waits for something else, because the stream aborts it.
fn async_stream<T, F>(produce: impl FnOnce(tokio::sync::mpsc::Sender<T>) -> F) -> BoxStream<'static, T>
where
    T: Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    // A few messages of slack between the model and a slow client; more would only hide that it is slow.
    let (sender, receiver) = tokio::sync::mpsc::channel(16);
    let task = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(produce(sender)));
    let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
    Box::pin(futures::stream::unfold((stream, task), |(mut stream, task)| async move {
        let message = futures::StreamExt::next(&mut stream).await?;
        Some((message, (stream, task)))
    }))
}

/// When the client stops waiting, from the call's `grpc-timeout`.
fn deadline<T>(request: &Request<T>) -> Option<Instant> {
    let text = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    wire::grpc_timeout(text).map(|timeout| Instant::now() + timeout)
}
