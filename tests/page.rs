//! The web page of a cluster of two nodes, in a real browser: load a model, ask it, look at the map and the jobs, all by keyboard where a
//! person would; nothing complains, and the policy holds.

use anyhow::{Context as _, Result, ensure};
use mlxnode_testkit::browser::{Browser, Key};
use mlxnode_testkit::cluster::LocalCluster;
use mlxnode_testkit::eventually::eventually;
use serde_json::{Value, json};
use std::time::Duration;

/// Asks an endpoint from the page, as the page does.
fn ask(browser: &mut Browser, path: &str, body: Option<Value>) -> Result<Value> {
    let body = body.map_or("undefined".to_owned(), |body| format!("JSON.stringify({body})"));
    browser.evaluate(&format!(
        "fetch({}, {{method: {body} ? 'POST' : 'GET', body: {body}}}).then(async (answer) => ({{status: answer.status, body: await answer.json()}}))",
        json!(path)
    ))
}

fn click(browser: &mut Browser, selector: &str) -> Result<()> {
    browser.evaluate(&format!("document.querySelector({}).click()", json!(selector))).map(drop)
}

fn text(browser: &mut Browser, selector: &str) -> Result<String> {
    let text = browser.evaluate(&format!("document.querySelector({})?.innerText ?? ''", json!(selector)))?;
    Ok(text.as_str().unwrap_or_default().to_owned())
}

#[test]
fn story_the_page_loads_a_model_and_chats_by_keyboard() -> Result<()> {
    let cluster = LocalCluster::start(2)?;
    let node = cluster.first();
    let http = node.ready.http.clone().context("an HTTP listener")?;
    let mut browser = Browser::start()?;
    browser.resize(1280, 900, false)?;
    browser.open(&format!("{http}/"))?;

    // The cluster: both nodes on the map and in the table, with the round trip between them.
    browser.wait_for("document.querySelector('#live').innerText.trim() === 'live'")?;
    browser.wait_for("document.querySelectorAll('#map g rect.node').length === 2")?;
    browser.wait_for("/ (µs|ms)/.test(document.querySelector('#map svg').textContent)")?;
    let nodes = text(&mut browser, "#nodes tbody")?;
    ensure!(nodes.contains("node0") && nodes.contains("node1"), "{nodes}");
    ensure!(text(&mut browser, "#stages tbody")?.contains("No model is loaded"));

    // From the top by keyboard: the skip link first, then the views.
    browser.tab_to("#skip", 1)?;
    browser.tab_to("nav a[href='#models']", 4)?;
    let ring = "getComputedStyle(document.activeElement).outlineStyle";
    ensure!(browser.evaluate(ring)? == json!("solid"), "the focus can be seen");
    browser.press(Key::Enter)?;
    browser.wait_for("document.activeElement.id === 'title-models'")?;
    ensure!(browser.evaluate("document.title")? == json!("Models · mlxnode"));

    // Plan and load the demo model over both nodes.
    browser.tab_to("#load-model", 8)?;
    browser.write("demo")?;
    browser.tab_to("#load summary", 1)?;
    browser.press(Key::Space)?;
    browser.tab_to("#load-stages", 3)?;
    browser.write("2")?;
    browser.tab_to("#do-plan", 12)?;
    browser.press(Key::Enter)?;
    browser.wait_for("/Fits: 2 stages/.test(document.querySelector('#load-result').innerText)")?;
    let plan = text(&mut browser, "#load-result")?;
    ensure!(plan.contains("node0") && plan.contains("node1") && plan.contains("llama"), "{plan}");
    click(&mut browser, "#load-pin")?;
    click(&mut browser, "#load-lookup")?;
    let excluded = "['#load-ttl', '#load-draft'].every((name) => document.querySelector(name).disabled)";
    ensure!(
        browser.evaluate(excluded)? == json!(true),
        "a model that stays has no time to live, and one thing guesses"
    );
    click(&mut browser, "#do-load")?;
    browser.wait_for("/demo is ready/.test(document.querySelector('#load-result').innerText)")?;
    browser.wait_for("document.querySelectorAll('.deployment .layers li').length === 2")?;
    browser.wait_for("document.querySelector('.deployment .badge').innerText.trim() === 'ready'")?;

    // Chat: the answer streams into text nodes, and its figures stand below it.
    click(&mut browser, "nav a[href='#chat']")?;
    browser.wait_for("document.querySelector('#chat-model').value === 'demo'")?;
    browser.evaluate("document.querySelector('#chat-input').focus()")?;
    browser.write("<img src=x onerror=alert(1)> What is 17 + 25?")?;
    browser.press(Key::Enter)?;
    browser.wait_for("/tokens\\/s/.test(document.querySelector('.turn.assistant .end')?.innerText ?? '')")?;
    let answer = text(&mut browser, ".turn.assistant .said")?;
    ensure!(!answer.trim().is_empty(), "the model said something");
    ensure!(browser.evaluate("document.querySelectorAll('#chat-log img').length")? == json!(0));
    ensure!(text(&mut browser, ".turn.user .said")?.contains("<img src=x"));
    ensure!(browser.evaluate("document.activeElement.id")? == json!("chat-input"), "the focus stays");

    // What the stages did is on the page and in the endpoint, whichever node is asked.
    click(&mut browser, "nav a[href='#cluster']")?;
    browser.wait_for("document.querySelectorAll('#stages tbody tr').length === 2")?;
    browser.wait_for("document.querySelectorAll('#map path.flow').length === 1")?;
    // A look may be half a second old.
    let picture = eventually(Duration::from_secs(10), || {
        let picture = ask(&mut browser, "/api/v1/cluster", None)?;
        ensure!(picture["status"] == 200, "{picture}");
        let stages = picture["body"]["deployments"][0]["stages"].as_array().context("stages")?;
        ensure!(stages.iter().all(|stage| stage["figures"]["steps"].as_u64() > Some(0)), "{picture}");
        Ok(picture)
    })?;
    let deployment = &picture["body"]["deployments"][0];
    ensure!(deployment["pinned"] == true && deployment["guessing"]["prompt_lookup"] == 3, "{picture}");
    let stages = deployment["stages"].as_array().context("stages")?;
    ensure!(stages.len() == 2, "{picture}");
    for stage in stages {
        let figures = &stage["figures"];
        ensure!(
            figures["steps"].as_u64() > Some(0) && figures["prompt_tokens"].as_u64() > Some(0),
            "{stage}"
        );
        ensure!(figures["compute_seconds"].as_f64() > Some(0.0), "{stage}");
    }
    ensure!(stages[0]["figures"]["sent_bytes"].as_u64() > Some(0), "{}", stages[0]);
    ensure!(stages[0]["node"] != stages[1]["node"], "{picture}");
    for node in picture["body"]["nodes"].as_array().context("nodes")? {
        ensure!(node["answers"] == true && node["links"][0]["rtt_seconds"].as_f64() > Some(0.0), "{node}");
    }

    // Jobs: none, and the page says so.
    click(&mut browser, "nav a[href='#jobs']")?;
    browser.wait_for("document.querySelector('#no-jobs').offsetParent !== null")?;

    // Dark and narrow: nothing is wider than the window.
    browser.resize(380, 800, true)?;
    for view in ["cluster", "models", "chat", "jobs"] {
        click(&mut browser, &format!("nav a[href='#{view}']"))?;
        browser.wait_for(&format!("!document.querySelector('#view-{view}').hidden"))?;
        let width = browser.evaluate("document.documentElement.scrollWidth")?;
        ensure!(width.as_u64() <= Some(380), "{view} is {width} wide");
    }
    let ground = "getComputedStyle(document.body).backgroundColor";
    let dark = browser.evaluate(ground)?;
    click(&mut browser, "#theme")?;
    ensure!(browser.evaluate(ground)? != dark, "the button overrules the system");

    // Unloading asks first, in a dialog that keeps the focus and gives it back.
    click(&mut browser, "nav a[href='#models']")?;
    browser.evaluate("document.querySelector('.deployment header button').focus()")?;
    browser.press(Key::Enter)?;
    browser.wait_for("document.querySelector('#ask-dialog').open")?;
    for _ in 0..6 {
        browser.press(Key::Tab)?;
        let place = browser
            .evaluate("document.activeElement.closest('dialog, body').tagName + document.hasFocus()")?;
        ensure!(
            place != json!("BODYtrue")
                || browser.evaluate("document.activeElement === document.body")? == json!(true),
            "{place}"
        );
    }
    browser.press(Key::Escape)?;
    browser.wait_for("document.activeElement.innerText === 'Unload'")?;
    browser.press(Key::Enter)?;
    browser.wait_for("document.querySelector('#ask-dialog').open")?;
    click(&mut browser, "#ask-yes")?;
    browser.wait_for("document.querySelector('#no-models').offsetParent !== null")?;
    ensure!(node.json(&["status"])?["deployments"] == json!([]), "it is unloaded");

    // Nothing complained; and what the policy forbids is refused by the browser.
    let complaints = browser.complaints()?.to_vec();
    ensure!(complaints.is_empty(), "{complaints:?}");
    let inline = "const script = document.createElement('script'); script.textContent = 'window.foreign = true'; document.body.append(script)";
    browser.evaluate(inline)?;
    ensure!(browser.evaluate("window.foreign === undefined")? == json!(true), "the policy holds");
    ensure!(browser.complaints()?.iter().any(|complaint| complaint.contains("Content Security Policy")));
    Ok(())
}

/// Puts a file into a field, as somebody who chooses one does.
fn choose(browser: &mut Browser, selector: &str, name: &str, content: &str) -> Result<()> {
    let (selector, name, content) = (json!(selector), json!(name), json!(content));
    let script = format!(
        "(() => {{ const chosen = new DataTransfer(); chosen.items.add(new File([{content}], {name})); \
         const field = document.querySelector({selector}); field.files = chosen.files; \
         field.dispatchEvent(new Event('change', {{bubbles: true}})); }})()"
    );
    browser.evaluate(&script).map(drop)
}

fn fill(browser: &mut Browser, selector: &str, text: &str) -> Result<()> {
    browser.evaluate(&format!("document.querySelector({}).focus()", json!(selector)))?;
    browser.evaluate(&format!("document.querySelector({}).select()", json!(selector)))?;
    browser.write(text)
}

#[test]
fn story_the_page_submits_watches_and_serves_a_job() -> Result<()> {
    let cluster = LocalCluster::start(1)?;
    let node = cluster.first();
    node.json(&["load", "demo"])?;
    let http = node.ready.http.clone().context("an HTTP listener")?;
    let mut browser = Browser::start()?;
    browser.resize(1280, 900, false)?;
    browser.open(&format!("{http}/#jobs"))?;
    browser.wait_for("document.querySelector('#no-jobs').offsetParent !== null")?;
    browser.wait_for("document.querySelector('#train-models option')?.value === 'demo'")?;

    // A row that is wrong is named before anything runs.
    browser.tab_to("#train-model", 12)?;
    browser.write("demo")?;
    browser.tab_to("#train-suffix", 1)?;
    browser.write("poet")?;
    choose(&mut browser, "#train-rows", "rows.jsonl", "{\"text\": \"a\"}\n{\"text\": 7}\n")?;
    browser.tab_to("#train summary", 3)?;
    browser.press(Key::Space)?;
    browser.tab_to("#do-train", 8)?;
    browser.press(Key::Enter)?;
    browser.wait_for("/line 2/.test(document.querySelector('#train-result').innerText)")?;
    ensure!(node.json(&["jobs", "list"])?["jobs"] == json!([]), "nothing was submitted");

    // A long one stands still, goes on and ends as it is told, by keyboard.
    let rows: String = (10..26).map(|a| format!("{{\"text\": \"What is {a} + 2? {}\"}}\n", a + 2)).collect();
    choose(&mut browser, "#train-rows", "rows.jsonl", &rows)?;
    fill(&mut browser, "#train-batch", "1")?;
    fill(&mut browser, "#train-keys", "num_layers: 1")?;
    fill(&mut browser, "#train-epochs", "500")?;
    browser.tab_to("#do-train", 8)?;
    browser.press(Key::Enter)?;
    browser.wait_for("/is submitted/.test(document.querySelector('#train-result').innerText)")?;
    let badge =
        |state: &str| format!("document.querySelector('[data-job] .badge').innerText.trim() === '{state}'");
    browser.wait_for(&badge("running"))?;
    browser.wait_for("/step \\d+ of/.test(document.querySelector('[data-job]').innerText)")?;
    browser
        .wait_for("document.querySelector('[data-job] .curve .training')?.getAttribute('d').includes('L')")?;
    browser.evaluate("document.querySelector('[data-change=pause]').focus()")?;
    browser.press(Key::Enter)?;
    browser.wait_for(&badge("paused"))?;
    browser.wait_for("document.activeElement.dataset.change === 'resume'")?;
    browser.press(Key::Enter)?;
    browser.wait_for(&badge("running"))?;
    click(&mut browser, "[data-change=cancel]")?;
    browser.wait_for("document.querySelector('#ask-dialog').open")?;
    click(&mut browser, "#ask-yes")?;
    browser.wait_for(&badge("cancelled"))?;

    // A short one is served when it is done; what it saved, under another name too.
    browser.evaluate("document.querySelector('#train-model').value = ''")?;
    fill(&mut browser, "#train-model", "demo")?;
    fill(&mut browser, "#train-suffix", "poet")?;
    choose(&mut browser, "#train-rows", "rows.jsonl", &rows)?;
    fill(&mut browser, "#train-keys", "num_layers: 1")?;
    fill(&mut browser, "#train-epochs", "1")?;
    click(&mut browser, "#do-train")?;
    browser.wait_for("document.querySelectorAll('[data-job]').length === 2")?;
    browser.wait_for("/served as demo:poet/.test(document.querySelector('[data-job]').innerText)")?;
    let first = text(&mut browser, "[data-job]")?;
    ensure!(first.contains("step 4 of 4") && first.contains("finished"), "{first}");
    browser.evaluate("document.querySelector('[data-job] details summary').focus()")?;
    browser.press(Key::Space)?;
    browser.wait_for("document.querySelector('[data-job] details').open")?;
    fill(&mut browser, "[data-job] .publish input", "again")?;
    browser.press(Key::Enter)?;
    browser.wait_for("/demo:again/.test(document.querySelector('[data-job] [role=status]').innerText)")?;
    let opened = "document.querySelector('[data-job] details').open && document.activeElement.matches('.publish input')";
    ensure!(browser.evaluate(opened)? == json!(true), "what is open and has the focus stays so");
    click(&mut browser, "nav a[href='#chat']")?;
    browser.wait_for("[...document.querySelectorAll('#chat-model option')].some((option) => option.value === 'demo:again')")?;

    browser.resize(380, 800, true)?;
    click(&mut browser, "nav a[href='#jobs']")?;
    browser.wait_for("!document.querySelector('#view-jobs').hidden")?;
    let width = browser.evaluate("document.documentElement.scrollWidth")?;
    ensure!(width.as_u64() <= Some(380), "jobs are {width} wide");
    let complaints = browser.complaints()?.to_vec();
    // The browser itself notes the answer with status 400.
    let ours: Vec<_> = complaints.iter().filter(|complaint| !complaint.contains("400")).collect();
    ensure!(ours.is_empty(), "{ours:?}");
    Ok(())
}

#[test]
fn story_the_page_asks_for_a_key_and_shows_what_it_may() -> Result<()> {
    let cluster = LocalCluster::start(1)?;
    let node = cluster.first();
    node.json(&["load", "demo"])?;
    let user = node.json(&["keys", "create", "ann"])?["key"].as_str().context("a key")?.to_owned();
    let http = node.ready.http.clone().context("an HTTP listener")?;
    let mut browser = Browser::start()?;
    browser.open(&format!("{http}/#models"))?;
    browser.wait_for("document.querySelector('#key-dialog').open")?;
    browser.wait_for("document.activeElement.id === 'key-text'")?;
    browser.write("mlx-wrong")?;
    browser.press(Key::Enter)?;
    browser.wait_for("/does not take this key/.test(document.querySelector('#key-why').innerText) && document.querySelector('#key-dialog').open")?;
    browser.write(&user)?;
    browser.press(Key::Enter)?;
    browser.wait_for("document.querySelector('#live').innerText.trim() === 'live'")?;
    browser.wait_for("document.querySelector('#key').innerText === 'Key: ann'")?;
    // A user looks and asks; what changes the cluster is not offered, and refused when it is asked for anyway.
    browser.wait_for("document.querySelectorAll('.deployment').length === 1")?;
    ensure!(
        browser.evaluate(
            "document.querySelector('#load').hidden && document.querySelector('.deployment button').hidden && document.querySelector('#train').hidden"
        )? == json!(true)
    );
    let refused = browser.evaluate(&format!(
        "fetch('/api/v1/unload', {{method: 'POST', headers: {{authorization: 'Bearer {user}'}}, body: '{{\"model\": \"demo\"}}'}}).then((answer) => answer.status)"
    ))?;
    ensure!(refused == json!(403), "{refused}");
    let kept = "[location.href, JSON.stringify(localStorage), document.cookie].join(' ')";
    let kept = browser.evaluate(kept)?;
    ensure!(
        !kept.as_str().unwrap_or_default().contains(&user[4..]),
        "the key is kept in this tab only: {kept}"
    );
    // Revoked, it is out within a second, on a stream that runs too.
    node.json(&["keys", "create", "root", "--role", "admin"])?;
    node.json(&["keys", "revoke", "ann"])?;
    eventually(Duration::from_secs(10), || {
        ensure!(
            browser.evaluate("document.querySelector('#key-dialog').open")? == json!(true),
            "still shown"
        );
        Ok(())
    })
}
