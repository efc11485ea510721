//! `Inference` over a [`Front`].

use crate::caller::Caller;
use crate::conversation::{embed, find_model};
use crate::error::ApiError;
use crate::front::{Front, FrontError, Input};
use crate::inference::run::Run;
use crate::inference::{status, wire};
use crate::rpc::caller;
use futures::stream::{self, BoxStream, StreamExt as _};
use mlxnode_proto::v1::generate_batch_response::Event;
use mlxnode_proto::v1::inference_server::Inference;
use mlxnode_proto::v1::{
    DetokenizeRequest, DetokenizeResponse, EmbedRequest, EmbedResponse, GenerateBatchRequest,
    GenerateBatchResponse, GenerateRequest, GenerateResponse, RenderChatRequest, RenderChatResponse,
    TokenizeRequest, TokenizeResponse,
};
use mlxnode_text::ChatRequest;
use std::sync::Arc;
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
    type GenerateBatchStream = BoxStream<'static, Result<GenerateBatchResponse, Status>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (caller, deadline) = (caller(&request), deadline(&request));
        let asked = wire::asked(request.into_inner(), deadline).map_err(refused)?;
        let run = Run::start(&self.front, &caller, asked).await.map_err(refused)?;
        // Dropping the stream drops the run, which cancels the work.
        let said = stream::unfold(run, |mut run| async move {
            let said = run.next().await?;
            Some((said.map(wire::response).map_err(refused), run))
        });
        Ok(Response::new(said.boxed()))
    }

    async fn generate_batch(
        &self,
        request: Request<GenerateBatchRequest>,
    ) -> Result<Response<Self::GenerateBatchStream>, Status> {
        let (caller, deadline) = (Arc::new(caller(&request)), deadline(&request));
        let requests = request.into_inner().requests;
        let answers: usize = requests.iter().map(|request| request.samples.max(1) as usize).sum();
        if requests.is_empty() || answers > wire::MAX_REQUESTS {
            let message = format!(
                "requests wants {answers} answers, but must want 1 to {}: each request at least one",
                wire::MAX_REQUESTS
            );
            return Err(refused(ApiError::field("requests", message)));
        }
        let all = requests.into_iter().enumerate().map(|(index, request)| {
            let one = One::Waits(self.front.clone(), caller.clone(), Box::new(request), deadline);
            stream::unfold(one, move |one| one.next(index)).boxed()
        });
        Ok(Response::new(stream::select_all(all).map(Ok).boxed()))
    }

    async fn embed(&self, request: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        let (caller, deadline) = (caller(&request), deadline(&request));
        let request = request.into_inner();
        let inputs = wire::inputs(request.inputs).map_err(refused)?;
        let model = find_model(&self.front, &caller, &request.model).await.map_err(hidden(&caller))?;
        let adapter = Some(request.adapter).filter(|adapter| !adapter.is_empty());
        let vectors =
            embed(&self.front, &caller, &model, inputs, adapter, deadline).await.map_err(refused)?;
        Ok(Response::new(wire::embeddings(vectors)))
    }

    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        let text = wire::text(request.text).map_err(refused)?;
        let model = find_model(&self.front, &caller, &request.model).await.map_err(hidden(&caller))?;
        let with_special = !request.no_special_tokens;
        let token_ids =
            off_the_threads(move || Ok(model.text.tokenizer.encode(&text, with_special)?)).await?;
        Ok(Response::new(TokenizeResponse { token_ids }))
    }

    async fn detokenize(
        &self,
        request: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        let model = find_model(&self.front, &caller, &request.model).await.map_err(hidden(&caller))?;
        let text =
            off_the_threads(move || Ok(model.text.tokenizer.decode(&request.token_ids, false)?)).await?;
        Ok(Response::new(DetokenizeResponse { text }))
    }

    async fn render_chat(
        &self,
        request: Request<RenderChatRequest>,
    ) -> Result<Response<RenderChatResponse>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        let chat = request.chat.ok_or_else(|| refused(ApiError::field("chat", "chat is missing")))?;
        let conversation = wire::conversation(chat).map_err(refused)?;
        let model = find_model(&self.front, &caller, &request.model).await.map_err(hidden(&caller))?;
        let chat = ChatRequest {
            tools: conversation.tools.for_template(&model.text).map_err(refused)?,
            messages: conversation.messages,
            add_generation_prompt: !conversation.is_unopened && conversation.prefill.is_none(),
            continue_final: conversation.prefill,
            thinking: conversation.thinking,
            arguments: conversation.arguments,
            ..ChatRequest::default()
        };
        let rendered = off_the_threads(move || {
            let text = model.text.render(&chat)?;
            let token_ids = model.text.tokenize(&Input::Chat(chat))?;
            Ok(RenderChatResponse { text, token_ids })
        });
        Ok(Response::new(rendered.await?))
    }
}

/// One request of a batch.
enum One {
    Waits(Front, Arc<Caller>, Box<GenerateRequest>, Option<Instant>),
    Runs(Box<Run>),
    Over,
}

impl One {
    async fn next(self, index: usize) -> Option<(GenerateBatchResponse, Self)> {
        let begun = match self {
            Self::Waits(front, caller, request, deadline) => match wire::asked(*request, deadline) {
                Ok(asked) => Run::start(&front, &caller, asked).await.map(Box::new),
                Err(error) => Err(error),
            },
            Self::Runs(run) => Ok(run),
            Self::Over => return None,
        };
        let (event, after) = match begun {
            Ok(mut run) => match run.next().await? {
                Ok(said) => (Event::Response(wire::response(said)), Self::Runs(run)),
                Err(error) => (Event::Failure(wire::failure(&error)), Self::Over),
            },
            Err(error) => (Event::Failure(wire::failure(&error)), Self::Over),
        };
        Some((GenerateBatchResponse { request: index as u32, event: Some(event) }, after))
    }
}

fn refused(error: ApiError) -> Status {
    status(&error)
}

/// For a key that is held to some models, without the names of the others.
fn hidden(caller: &Caller) -> impl FnOnce(ApiError) -> Status {
    let is_limited = caller.key.as_ref().is_some_and(|key| !key.models.is_empty());
    move |error| status(&if is_limited { error.without_names() } else { error })
}

/// Templates are other people's programs and texts can be long: the asynchronous threads are not for them.
async fn off_the_threads<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FrontError> + Send + 'static,
) -> Result<T, Status> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| status(&error.into())),
        Err(error) => {
            tracing::error!(%error, "a call failed");
            Err(Status::internal("the call failed; the node's log says why"))
        }
    }
}

/// When the client stops waiting, from the call's `grpc-timeout`.
fn deadline<T>(request: &Request<T>) -> Option<Instant> {
    let text = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    wire::grpc_timeout(text).map(|timeout| Instant::now() + timeout)
}
