//! Tokens guessed ahead on a cluster: the same answers as without, in one stage and over two nodes, by a draft model and from the text.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::node::NodeProcess;
use serde_json::{Value, json};

/// What is asked: greedy and seeded, with penalties, stops, log-probabilities, scores and a format; short and beyond a block of the prompt cache.
fn requests() -> Vec<Value> {
    let question = "<|user|>What is 17 + 25?<|end|><|assistant|>";
    let long = (0..300).map(|place| 40 + (place * 7) % 50).collect::<Vec<u32>>();
    vec![
        json!({"prompt": question, "temperature": 0, "max_tokens": 20}),
        json!({"prompt": long, "temperature": 0, "max_tokens": 90, "ignore_eos": true, "logprobs": 2}),
        json!({"prompt": long[..40], "temperature": 1.3, "seed": 4, "max_tokens": 60, "ignore_eos": true, "logprobs": 1}),
        json!({"prompt": long[..9], "temperature": 0.8, "seed": 5, "max_tokens": 40, "repetition_penalty": 1.2,
            "presence_penalty": 0.4, "logit_bias": {"50": 2.0}, "ignore_eos": true, "top_p": 0.9}),
        json!({"prompt": question, "temperature": 0, "max_tokens": 20, "stop": ["2"]}),
        json!({"prompt": question, "temperature": 0, "max_tokens": 20, "guided_regex": "[0-9]{2} apples"}),
        json!({"prompt": long[..20], "temperature": 0, "max_tokens": 1}),
        json!({"prompt": long[..20], "temperature": 0, "max_tokens": 3, "echo": true, "logprobs": 1}),
        json!({"prompt": [long[..30], long[..31]], "temperature": 0.9, "seed": 8, "n": 3, "max_tokens": 30, "ignore_eos": true}),
    ]
}

fn ask(node: &NodeProcess, path: &str, body: Option<&Value>) -> Result<String> {
    let url = format!("{}{path}", node.ready.http.as_deref().context("an HTTP listener")?);
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut answer = match body {
        Some(body) => agent.post(url).send(body.to_string())?,
        None => agent.get(url).call()?,
    };
    let text = answer.body_mut().read_to_string()?;
    ensure!(answer.status() == 200, "{}: {text}", answer.status());
    Ok(text)
}

/// What the node answers to all of them, without what differs from call to call.
fn answers(node: &NodeProcess) -> Result<Vec<Value>> {
    let one = |request: &Value| -> Result<Value> {
        let answer: Value = serde_json::from_str(&ask(node, "/v1/completions", Some(request))?)?;
        Ok(json!({"choices": answer["choices"], "tokens": answer["usage"]["completion_tokens"]}))
    };
    requests().iter().map(one).collect()
}

/// Are they the same, but for the last digits of log-probabilities?
fn alike(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(key, value)| other.get(key).is_some_and(|other| alike(value, other)))
        }
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| alike(one, other))
        }
        (Value::Number(one), Value::Number(other)) => {
            let number = |it: &serde_json::Number| it.as_f64().unwrap_or(f64::NAN);
            (number(one) - number(other)).abs() <= 1e-3
        }
        _ => one == other,
    }
}

/// Tokens that were guessed and those that were right, as all nodes together tell.
fn counted(cluster: &LocalCluster) -> Result<[u64; 2]> {
    let mut sums = [0, 0];
    for node in &cluster.nodes {
        let text = ask(node, "/metrics", None)?;
        for (sum, name) in sums.iter_mut().zip(["draft", "accepted"]) {
            let name = format!("vllm:spec_decode_num_{name}_tokens_total");
            for line in text.lines().filter(|line| line.starts_with(&name)) {
                *sum += line.rsplit(' ').next().context("a value")?.parse::<f64>()? as u64;
            }
        }
    }
    Ok(sums)
}

#[test]
fn story_guesses_change_no_answer() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    let node = cluster.first();
    node.json(&["load", "demo"])?;
    let expected = answers(node)?;
    ensure!(counted(&cluster)? == [0, 0], "nothing is guessed unless somebody wants it");
    let ways: [(&[&str], &str); 4] = [
        (&["--draft-model", "demo"], "a draft model"),
        (&["--prompt-lookup"], "the text"),
        (&["--stages", "2", "--draft-model", "demo", "--num-draft-tokens", "5"], "a draft model, two stages"),
        (&["--stages", "2", "--prompt-lookup", "2"], "the text, two stages"),
    ];
    for (flags, what) in ways {
        node.json(&["unload", "demo"])?;
        let loaded = node.json(&[&["load", "demo"], flags].concat())?;
        ensure!(loaded["guessing"]["num_draft_tokens"].as_u64() > Some(0), "{loaded}");
        let found = answers(&cluster.nodes[1])?; // the other node is the front
        for (request, (expected, found)) in requests().iter().zip(expected.iter().zip(&found)) {
            ensure!(alike(expected, found), "{what}: {request}\n{expected}\n{found}");
        }
        let [guessed, right] = counted(&cluster)?;
        ensure!(0 < right && right <= guessed, "{what}: {right} of {guessed} guesses are right");
        ensure!(
            flags.contains(&"--prompt-lookup") || 2 * right > guessed,
            "{what}: a model's own guesses: {right} of {guessed}"
        );
    }
    Ok(())
}

/// A request may turn guesses off or down; it answers the same.
#[test]
fn story_a_request_asks_for_fewer_guesses() -> Result<()> {
    let cluster = LocalCluster::start(1)?;
    let node = cluster.first();
    node.json(&["load", "demo", "--draft-model", "demo", "--num-draft-tokens", "4"])?;
    const TOKENS: u64 = 120;
    let asked = |more: Value| -> Result<(Value, u64)> {
        let mut body =
            json!({"prompt": [5, 6, 7], "temperature": 0, "max_tokens": TOKENS, "ignore_eos": true});
        for (name, value) in more.as_object().context("fields")? {
            body[name] = value.clone();
        }
        let before = counted(&cluster)?[0];
        let answer: Value = serde_json::from_str(&ask(node, "/v1/completions", Some(&body))?)?;
        Ok((answer["choices"][0]["text"].clone(), counted(&cluster)?[0] - before))
    };
    let (whole, many) = asked(json!({}))?;
    let (off, none) = asked(json!({"num_draft_tokens": 0}))?;
    let (down, few) = asked(json!({"num_draft_tokens": 1, "draft_model": "demo"}))?;
    let (more, as_loaded) = asked(json!({"num_draft_tokens": 9, "draft_model": "default_model"}))?;
    ensure!(whole == off && whole == down && whole == more, "{whole}\n{off}\n{down}\n{more}");
    // The model's own guesses are all right, so that a step brings one token and its guesses: 1 in 2 of them, or 4 in 5.
    ensure!(none == 0 && few > 0 && few <= TOKENS / 2 + 1, "{none} and {few} guesses");
    ensure!(many > TOKENS * 6 / 10 && as_loaded > TOKENS * 6 / 10, "{many} and {as_loaded} guesses");
    let error = ask(node, "/v1/completions", Some(&json!({"prompt": "x", "draft_model": "other"})));
    let error = format!("{:#}", error.err().context("another draft model guessed")?);
    ensure!(error.starts_with("400") && error.contains("--draft-model"), "{error}");
    Ok(())
}

#[test]
fn story_guesses_that_cannot_be_are_refused() -> Result<()> {
    let cluster = LocalCluster::start(1)?;
    let node = cluster.first();
    let refused = |arguments: &[&str], words: &str| -> Result<()> {
        let output = node.output(arguments)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && said.contains(words), "{arguments:?}: {said}");
        Ok(())
    };
    refused(&["load", "demo", "--draft-model", "/no/such/folder"], "/no/such/folder")?;
    refused(&["load", "demo", "--draft-model", "demo", "--prompt-lookup"], "cannot be used with")?;
    let url = node.ready.http.as_deref().context("an HTTP listener")?;
    for (body, words) in [
        (json!({"model": "demo", "draft_model": "demo", "prompt_lookup": 3}), "exclude each other"),
        (json!({"model": "demo", "prompt_lookup": 17}), "1 to 16"),
        (json!({"model": "demo", "num_draft_tokens": 3}), "needs draft_model"),
        (json!({"model": "demo", "draft_model": "demo", "num_draft_tokens": 33}), "1 to 32"),
    ] {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut answer = agent.post(format!("{url}/api/v1/load")).send(body.to_string())?;
        let (status, text) = (answer.status(), answer.body_mut().read_to_string()?);
        ensure!(status == 400 && text.contains(words), "{body}: {status} {text}");
    }
    // The plan counts the draft model.
    let planned = |flags: &[&str]| -> Result<u64> {
        let plan = node.json(&[&["plan", "demo"], flags].concat())?;
        plan["total_weight_bytes"].as_u64().with_context(|| plan.to_string())
    };
    let (plain, with_draft) = (planned(&[])?, planned(&["--draft-model", "demo"])?);
    ensure!(with_draft == 2 * plain, "{plain} and {with_draft}");
    Ok(())
}
