//! Models that are loaded because somebody asks for them, and replicas of one model.

use crate::desk::Desk;
use anyhow::{Context as _, Result};
use async_trait::async_trait;
use mlxnode_api::deployments::{DeploymentView, DeploymentsView, State};
use mlxnode_api::front::{Demand, Front, FrontError, GenerationRequest, Input};
use mlxnode_coordinator::requests::Parameters;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::watch;

/// Knows one model, and loads it within moments.
struct Loads {
    deployments: watch::Sender<DeploymentsView>,
    calls: AtomicUsize,
    fails: bool,
}

impl Loads {
    fn new(desk: &Desk, fails: bool) -> Arc<Self> {
        Arc::new(Self { deployments: desk.deployments.clone(), calls: AtomicUsize::new(0), fails })
    }
}

#[async_trait]
impl Demand for Loads {
    async fn knows(&self, model: &str) -> bool {
        model == "ann/asked"
    }

    async fn load(&self, model: &str) -> Result<(), String> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(20)).await;
        if self.fails {
            return Err("it does not fit".into());
        }
        let deployments = self.deployments.clone();
        let model = model.to_owned();
        // This node hears of it a moment after the coordinator said so.
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            deployments.send_modify(|view| add(view, &model, 1, State::Ready));
        });
        Ok(())
    }
}

/// A copy of the demo deployment under another name; once.
fn add(view: &mut DeploymentsView, name: &str, replica: usize, state: State) {
    let is_there = |it: &DeploymentView| (it.name.as_str(), it.replica) == (name, replica);
    if !view.deployments.iter().any(is_there) {
        let demo = view.deployments[0].clone();
        view.deployments.push(DeploymentView {
            name: name.into(),
            source: format!("hub/{name}"),
            replica,
            replicas: 2,
            epoch: 40 + replica as u64,
            state,
            ..demo
        });
    }
}

async fn ask(front: &Front, model: &str) -> Result<usize, FrontError> {
    let request = GenerationRequest {
        model: model.into(),
        input: Input::Prompt("SAY Hi.".into()),
        parameters: Parameters::default(),
        extra_eos: Vec::new(),
        deadline: None,
        tenant: String::new(),
        trace: None,
        is_read: false,
    };
    let mut answer = front.generate(request).await?;
    let mut events = 0;
    while let Some(event) = answer.next().await {
        event?;
        events += 1;
    }
    Ok(events)
}

#[tokio::test]
async fn the_first_one_who_asks_loads_the_model_and_others_wait_with_it() -> Result<()> {
    let desk = Desk::start().await?;
    let loads = Loads::new(&desk, false);
    let front = desk.front.clone().demanding(loads.clone());
    let (one, two) = tokio::join!(ask(&front, "ann/asked"), ask(&front, "ann/asked"));
    assert!(one? > 0 && two? > 0);
    let calls = loads.calls.load(Ordering::SeqCst);
    assert!(calls > 0);
    ask(&front, "ann/asked").await?;
    assert_eq!(loads.calls.load(Ordering::SeqCst), calls, "it is there now");
    // What is not known, and what one may not ask for, is loaded for nobody.
    let unknown = ask(&front, "ann/other").await;
    assert!(matches!(unknown, Err(FrontError::UnknownModel { .. })));
    desk.deployments.send_modify(|view| view.deployments.retain(|it| it.name != "ann/asked"));
    let denied = front.summon("ann/asked", |_| false).await;
    assert!(matches!(denied, Err(FrontError::UnknownModel { .. })));
    assert_eq!(loads.calls.load(Ordering::SeqCst), calls);
    desk.stop().await
}

#[tokio::test]
async fn a_model_that_is_loading_is_waited_for_and_one_that_cannot_be_loaded_says_why() -> Result<()> {
    let desk = Desk::start().await?;
    let front = desk.front.clone().demanding(Loads::new(&desk, true));
    let failed = ask(&front, "ann/asked").await.err().context("it fails")?;
    assert!(matches!(&failed, FrontError::NotLoaded { .. }) && failed.to_string().contains("does not fit"));
    // "later" is loading; without demand it is refused at once.
    assert!(matches!(ask(&desk.front, "later").await, Err(FrontError::NotReady { .. })));
    let waiting = tokio::spawn({
        let front = front.clone();
        async move { ask(&front, "later").await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    desk.deployments.send_modify(|view| {
        view.deployments.iter_mut().for_each(|it| it.state = State::Ready);
    });
    assert!(waiting.await?? > 0);
    desk.stop().await
}

#[tokio::test]
async fn replicas_answer_as_one_model_and_one_that_is_not_ready_gets_nothing() -> Result<()> {
    let desk = Desk::start().await?;
    desk.deployments.send_modify(|view| {
        add(view, "two", 1, State::Recovering);
        add(view, "two", 2, State::Ready);
    });
    for _ in 0..3 {
        ask(&desk.front, "two").await?;
    }
    let found = desk.front.deployment("two")?;
    assert_eq!((found.replica, found.instance().as_str()), (2, "two#2"), "the one that is ready");
    // Both of one name are no ambiguity.
    desk.deployments.send_modify(|view| view.deployments.retain(|it| it.name == "two"));
    ask(&desk.front, "").await?;
    desk.stop().await
}
