//! A request that is checked and tokenized, ready to run once or several times.

use crate::deployments::DeploymentView;
use crate::front::names::{adapter_key, check_draft};
use crate::front::{
    Answer, Front, FrontError, GenerationRequest, Input, ModelText, Origin, Output, check_ready, fresh_seed,
    named,
};
use mlxnode_coordinator::requests::ValidRequest;
use mlxnode_coordinator::scheduler::RunRequest;
use serde_json::Value;
use std::sync::Arc;
use std::time::Instant;

/// A generation that may start.
#[derive(Clone)]
pub struct Prepared {
    /// Whose.
    pub deployment: DeploymentView,
    /// Its tokenizer and the rest.
    pub text: Arc<ModelText>,
    /// Prompt and parameters.
    pub valid: ValidRequest,
    /// The request's function schemas, when the answer is to be read.
    tools: Option<Vec<Value>>,
    deadline: Option<Instant>,
    tenant: String,
    origin: Origin,
}

impl Front {
    /// Everything that can be done before the first step.
    ///
    /// # Errors
    /// An unknown model, a prompt that cannot be made, a parameter out of its range.
    pub async fn prepare(&self, request: GenerationRequest) -> Result<Prepared, FrontError> {
        let arrived = Instant::now();
        let (deployment, adapter) = self.summon(&request.model, |_| true).await?;
        check_ready(&deployment)?;
        let mut parameters = request.parameters;
        parameters.adapter = adapter_key(&deployment, parameters.adapter.or(adapter).as_deref())?;
        check_draft(&deployment, parameters.draft_model.as_deref())?;
        // Tokenizing is the first that costs something: who has no chance is refused before it.
        let _place = self.enter(&deployment.name, arrived)?;
        let text = self.model_text(&deployment).await?;
        let tools = match &request.input {
            _ if !request.is_read => None,
            Input::Chat(chat) => Some(chat.tools.clone().unwrap_or_default()),
            Input::Prompt(_) | Input::Tokens(_) => Some(Vec::new()),
        };
        let prompt = text.clone().tokenize_blocking(request.input).await?;
        for token in &request.extra_eos {
            parameters.extra_stop_tokens.push(text.tokenizer.parse_token(token)?);
        }
        let limits = text.limits(&deployment)?;
        let mut valid = ValidRequest::new(prompt, parameters, &limits, fresh_seed())?;
        valid.spec.trace = Some(named(request.trace));
        let (deadline, tenant) = (request.deadline, request.tenant);
        let origin = Origin { arrived, parent: request.trace.map(|trace| trace.span_id()) };
        Ok(Prepared { deployment, text, valid, tools, deadline, tenant, origin })
    }

    /// Runs the sample of this number: its seed is the request's plus the number. Dropping the answer cancels it within one step.
    ///
    /// # Errors
    /// When the replica does not take it.
    pub async fn start(&self, prepared: &Prepared, sample: u64) -> Result<Answer, FrontError> {
        let Prepared { deployment, text, valid, tools, deadline, tenant, origin } = prepared.clone();
        let reader = tools.map(|tools| text.answers.parser(&tools, &valid.prompt)).transpose()?;
        let output = Output::new(&text, valid.stop, reader)?;
        let mut spec = valid.spec;
        spec.sampling.seed = spec.sampling.seed.wrapping_add(sample);
        let seed = spec.sampling.seed;
        // Each sample is a span of its own.
        spec.trace =
            spec.trace.map(|trace| if sample == 0 { trace } else { trace.with_span(rand::random()) });
        let run = RunRequest { prompt: valid.prompt, spec, deadline, tenant };
        let mut account = self.account(&deployment, &run, origin);
        let stream = self.run(&deployment, run).await.map_err(|error| account.failed(error))?;
        Ok(Answer::new(deployment, stream, output, account, seed))
    }

    /// [`Front::prepare`] and [`Front::start`]. The answer is a stream; dropping it cancels the work within one step.
    ///
    /// # Errors
    /// Everything that can be known before the first step.
    pub async fn generate(&self, request: GenerationRequest) -> Result<Answer, FrontError> {
        let prepared = self.prepare(request).await?;
        self.start(&prepared, 0).await
    }
}
