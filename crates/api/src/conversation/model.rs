//! The model that a request means, and whether it can follow a grammar.

use crate::caller::Caller;
use crate::deployments::DeploymentView;
use crate::error::{ApiError, ErrorKind};
use crate::front::{Front, ModelText};
use mlxnode_compute::Grammar;
use std::sync::Arc;

/// The model that a request means.
pub(crate) struct Model {
    pub(crate) deployment: DeploymentView,
    pub(crate) text: Arc<ModelText>,
    /// The adapter that its name asks for, as in `base:adapter`.
    pub(crate) adapter: Option<String>,
}

/// mlx_lm.server's word for "the one that is loaded".
const ANY_MODEL: &str = "default_model";

/// Finds a model by what the client wrote into `model`: a deployment's name, where its weights come from, or `NAME:ADAPTER`.
///
/// # Errors
/// When there is none, several, or the caller may not use it.
pub(crate) async fn find_model(front: &Front, caller: &Caller, model: &str) -> Result<Model, ApiError> {
    let name = if model == ANY_MODEL { "" } else { model };
    let (deployment, adapter) = front.summon(name, |model| caller.may_use(model)).await?;
    if !caller.may_use(&deployment.name) {
        // Whoever may not use a model need not learn that it is there.
        let error = ApiError::new(ErrorKind::NoModel, format!("no model named {model:?} is loaded"));
        return Err(ApiError { param: Some("model".to_owned()), ..error });
    }
    let text = front.text_of(&deployment).await?;
    Ok(Model { deployment, text, adapter })
}

/// The grammar, compiled once to see whether it can be: the last stage compiles it again for itself.
pub(crate) async fn check_grammar(
    model: &Model,
    grammar: Option<&Grammar>,
    param: &str,
) -> Result<(), ApiError> {
    let Some(grammar) = grammar.cloned() else { return Ok(()) };
    if grammar.text().len() > Grammar::MAX_BYTES {
        let message = format!("{param} has {} bytes, more than {}", grammar.text().len(), Grammar::MAX_BYTES);
        return Err(ApiError::field(param, message));
    }
    let text = Arc::clone(&model.text);
    let compiling = tokio::task::spawn_blocking(move || {
        let vocabulary = text.grammars()?;
        vocabulary.compile((&grammar).into()).map(drop)
    });
    let compiled = compiling
        .await
        .map_err(|_| ApiError::new(ErrorKind::Internal, "the grammar could not be compiled"))?;
    compiled.map_err(|error| ApiError::field(param, format!("{param}: {error}")))
}
