//! Every route as data: path, method, who may call it. The router is made of this table, so that nothing is served that is not in it.

pub use crate::gate::Access;
use crate::http::entrance::{self, Entrance};
use crate::http::{
    ApiError, Dialect, ErrorKind, HttpServices, anthropic, guard, health, metrics, openai, openapi, page,
    requests,
};
use axum::Router;
use axum::extract::Request;
use axum::http::Method;
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{MethodRouter, delete, get, post};
use std::sync::Arc;

/// One route.
#[derive(Clone)]
pub struct Route {
    /// Path, with `{name}` for a part and `{*name}` for the rest.
    pub path: &'static str,
    /// Method.
    pub method: Method,
    /// Who may call it.
    pub access: Access,
    handler: MethodRouter<HttpServices>,
}

/// All routes. One path exists twice, because mlx_lm.server has it without `/v1` as well.
pub fn routes() -> Vec<Route> {
    let get_ = |path, access, handler| Route { path, method: Method::GET, access, handler };
    let post_ = |path, handler| Route { path, method: Method::POST, access: Access::User, handler };
    let change = |path, handler| Route { path, method: Method::POST, access: Access::Admin, handler };
    let train = |path, method, handler| Route { path, method, access: Access::Train, handler };
    vec![
        get_("/health", Access::Open, get(health::health)),
        get_("/metrics", Access::Metrics, get(metrics::metrics)),
        get_("/v1/models", Access::User, get(openai::models::list)),
        get_("/v1/models/{*model}", Access::User, get(openai::models::one)),
        get_("/openapi.json", Access::Open, get(openapi::document)),
        post_("/v1/chat/completions", post(openai::chat::chat_completions)),
        post_("/chat/completions", post(openai::chat::chat_completions)),
        post_("/v1/completions", post(openai::completions::completions)),
        post_("/v1/embeddings", post(openai::embeddings::embeddings)),
        post_("/v1/responses", post(openai::responses::responses)),
        post_("/v1/messages", post(anthropic::messages::messages)),
        post_("/v1/messages/count_tokens", post(anthropic::messages::count_tokens)),
        change("/v1/load_lora_adapter", post(openai::adapters::load)),
        change("/v1/unload_lora_adapter", post(openai::adapters::unload)),
        train("/v1/files", Method::POST, post(openai::files::upload)),
        train("/v1/files", Method::GET, get(openai::files::list)),
        train("/v1/files/{id}", Method::GET, get(openai::files::one)),
        train("/v1/files/{id}", Method::DELETE, delete(openai::files::delete)),
        train("/v1/files/{id}/content", Method::GET, get(openai::files::content)),
        train("/v1/fine_tuning/jobs", Method::POST, post(openai::fine_tuning::create)),
        train("/v1/fine_tuning/jobs", Method::GET, get(openai::fine_tuning::list)),
        train("/v1/fine_tuning/jobs/{id}", Method::GET, get(openai::fine_tuning::one)),
        train("/v1/fine_tuning/jobs/{id}/events", Method::GET, get(openai::fine_tuning::events)),
        train("/v1/fine_tuning/jobs/{id}/checkpoints", Method::GET, get(openai::fine_tuning::checkpoints)),
        train("/v1/fine_tuning/jobs/{id}/cancel", Method::POST, post(openai::fine_tuning::cancel)),
        train("/v1/fine_tuning/jobs/{id}/pause", Method::POST, post(openai::fine_tuning::pause)),
        train("/v1/fine_tuning/jobs/{id}/resume", Method::POST, post(openai::fine_tuning::resume)),
        get_("/", Access::Open, get(page::files::index)),
        get_("/page/{file}", Access::Open, get(page::files::file)),
        get_("/api/v1/session", Access::Read, get(page::cluster::session)),
        get_("/api/v1/cluster", Access::Read, get(page::cluster::cluster)),
        get_("/api/v1/events", Access::Read, get(page::cluster::events)),
        get_("/api/v1/jobs", Access::Read, get(page::jobs::jobs)),
        train("/api/v1/jobs/{id}/publish", Method::POST, post(page::jobs::publish)),
        change("/api/v1/plan", post(page::models::plan)),
        change("/api/v1/load", post(page::models::load)),
        change("/api/v1/unload", post(page::models::unload)),
    ]
}

/// The router over [`routes`]: unknown paths, wrong methods and foreign pages are answered in the caller's dialect.
pub fn router(services: HttpServices, guard: Arc<guard::Guard>) -> Router {
    let mut router = Router::new();
    let spans = services.front.spans();
    for route in routes() {
        let Route { path, access, handler, .. } = route;
        let entrance = Entrance { services: services.clone(), access, path };
        router = router
            .route(path, handler.route_layer(middleware::from_fn_with_state(entrance, entrance::check)));
    }
    router
        .method_not_allowed_fallback(wrong_method)
        .fallback(no_route)
        .with_state(services)
        .layer(middleware::from_fn(speak))
        .layer(middleware::from_fn_with_state(guard, guard::check))
        .layer(middleware::from_fn_with_state(spans, requests::name))
}

async fn no_route(request: Request) -> ApiError {
    let message =
        format!("there is nothing at {}; docs/http.md lists what there is", printable(request.uri().path()));
    ApiError::new(ErrorKind::NoRoute, message)
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} is not served at {}", request.method(), printable(request.uri().path()));
    ApiError::new(ErrorKind::Method, message)
}

fn printable(path: &str) -> String {
    path.chars().take(200).collect()
}

/// Errors are written in OpenAI's shape first; here those for Anthropic's clients get theirs.
async fn speak(request: Request, next: Next) -> Response {
    let dialect = Dialect::of_path(request.uri().path());
    let response = next.run(request).await;
    match response.extensions().get::<ApiError>() {
        Some(error) if dialect == Dialect::Anthropic => {
            let mut told = error.clone().respond(dialect);
            for (name, value) in response.headers() {
                if !told.headers().contains_key(name) {
                    told.headers_mut().insert(name, value.clone());
                }
            }
            told
        }
        _ => response,
    }
}
