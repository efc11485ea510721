//! `chat`, and who leaves in the midst of an answer.

use super::{NO_END, User, damaged, finish, stderr};
use serde_json::Value;
use std::io::Read as _;
use std::process::Child;

#[test]
fn a_conversation_comes_through_a_pipe() {
    let user = User::new();
    let input =
        "What is 2 + 3?\n\n/help\n/nonsense\nAnd 17 + 25?\n/reset\nWhat is 17 + 25?\n/quit\nnever read";
    let output = user.run_with_input(&["chat"], input);
    assert!(output.status.success(), "{}", stderr(&output));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!((lines.len(), lines[0], lines[2]), (3, "5", "42"), "{said}");
    assert!(stderr(&output).contains("/reset") && stderr(&output).contains("no command /nonsense"));

    let objects = user.run_with_input(&["chat", "--json"], "What is 2 + 3?\nWhat is 17 + 25?\n");
    let texts: Vec<Value> = String::from_utf8_lossy(&objects.stdout)
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].clone())
        .collect();
    assert_eq!(texts[0], "5");
    assert_eq!(texts.len(), 2);
}

#[test]
fn a_refused_message_does_not_end_the_conversation_but_shows() {
    let user = User::new();
    let (_folder, model) = damaged(|folder| {
        let template = "{% if 'bad' in messages[-1].content %}{{ raise_exception('no bad words') }}{% endif %}\
            {{ messages[-1].content }}";
        std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    });
    let output = user.run_with_input(&["chat", "--model", &model, "-m", "3"], "bad\ngood\n");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("refuses the conversation: no bad words"), "{}", stderr(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 2);
}

#[test]
fn ctrl_c_ends_the_answer_with_status_130() {
    let user = User::new();
    let mut child = endless(&user, &[]);
    let mut first = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    interrupt(&child);
    let output = finish(child);
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(stderr(&output).contains("Generation: "), "{}", stderr(&output));
}

#[test]
fn a_reader_who_leaves_is_no_failure() {
    let user = User::new();
    let mut child = endless(&user, &["-q"]);
    let mut first = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    drop(child.stdout.take());
    let output = finish(child);
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

/// An answer without end.
fn endless(user: &User, flags: &[&str]) -> Child {
    let arguments =
        [&["generate", "--prompt", "Sort 31, 4, 15", "-m", "-1"], NO_END.as_slice(), flags].concat();
    user.command(&arguments).spawn().unwrap()
}

fn interrupt(child: &Child) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
}

#[test]
fn messages_of_several_lines_and_turns_that_remember() {
    let user = User::new();
    let input = "What is \\\n2 + 3?\n\"\"\"\nAnd\n17 + 25?\n\"\"\"\n";
    let objects = user.run_with_input(&["chat", "--json"], input);
    assert!(objects.status.success(), "{}", stderr(&objects));
    let answers: Vec<Value> = String::from_utf8_lossy(&objects.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(answers.len(), 2);
    assert_eq!(answers[0]["cached_tokens"], 0);
    let first = answers[0]["prompt_tokens"].as_u64().unwrap();
    // All of the first turn but what the template puts behind an answer.
    assert!(answers[1]["cached_tokens"].as_u64().unwrap() >= first, "{answers:?}");
    assert!(answers[1]["prompt_tokens"].as_u64() > answers[1]["cached_tokens"].as_u64());
}
