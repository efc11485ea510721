//! What a client means by `model`: a deployment's name, where its weights come from, or `NAME:ADAPTER`.

use super::{Front, FrontError, best};
use crate::deployments::DeploymentView;
use crate::fields::shortened;
use mlxnode_coordinator::requests::OWN_DRAFT;

impl Front {
    /// The deployment that a client means, and the adapter that the name asks for.
    ///
    /// # Errors
    /// When there is none, or several are loaded and none is named.
    pub fn find(&self, model: &str) -> Result<(DeploymentView, Option<String>), FrontError> {
        let error = match self.deployment(model) {
            Ok(deployment) => return Ok((deployment, None)),
            Err(error) => error,
        };
        let deployments = self.deployments();
        if let Some(found) = best(&deployments, |deployment| deployment.source == model) {
            return Ok((found.clone(), None));
        }
        if let Some((base, adapter)) = model.rsplit_once(':')
            && let Some(found) =
                best(&deployments, |deployment| deployment.name == base || deployment.source == base)
        {
            return Ok((found.clone(), Some(adapter.to_owned())));
        }
        Err(error)
    }

    /// Has the deployment this adapter?
    ///
    /// # Errors
    /// When it has not, with those that there are, or the adapter cannot be used.
    pub fn check_adapter(
        &self,
        deployment: &DeploymentView,
        adapter: Option<&str>,
    ) -> Result<(), FrontError> {
        adapter_key(deployment, adapter).map(drop)
    }
}

/// What the workers call the adapter that a request asks for.
///
/// # Errors
/// [`FrontError::UnknownAdapter`], with those that there are, and [`FrontError::BrokenAdapter`].
pub(super) fn adapter_key(
    deployment: &DeploymentView,
    adapter: Option<&str>,
) -> Result<Option<String>, FrontError> {
    let Some(name) = adapter else { return Ok(None) };
    let model = deployment.name.clone();
    let Some(found) = deployment.adapters.iter().find(|adapter| adapter.name == name) else {
        let names: Vec<&str> = deployment.adapters.iter().map(|adapter| adapter.name.as_str()).collect();
        let loaded = match names.is_empty() {
            true => "it has none; load one with `mlxnode adapters load MODEL ADAPTER`".to_owned(),
            false => format!("it has: {}", names.join(", ")),
        };
        return Err(FrontError::UnknownAdapter { model, adapter: name.to_owned(), loaded });
    };
    match &found.problem {
        None => Ok(Some(found.key.clone())),
        Some(problem) => {
            Err(FrontError::BrokenAdapter { model, adapter: name.to_owned(), problem: problem.clone() })
        }
    }
}

/// May this draft model guess for the deployment? Only its own: others would have to be loaded for a request.
///
/// # Errors
/// [`FrontError::OtherDraft`]
pub(super) fn check_draft(deployment: &DeploymentView, draft: Option<&str>) -> Result<(), FrontError> {
    let own = deployment.guessing.as_ref().and_then(|guessing| guessing.draft.as_deref());
    match draft {
        None | Some(OWN_DRAFT) => Ok(()),
        draft if draft == own => Ok(()),
        Some(draft) => Err(FrontError::OtherDraft {
            model: deployment.name.clone(),
            draft: shortened(draft),
            // Not its name: that may be a folder of a node.
            has: if own.is_some() { "another one" } else { "none" },
        }),
    }
}
