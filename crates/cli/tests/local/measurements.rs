//! `benchmark` and `perplexity`.

use super::{User, check_sentence, stderr};

#[test]
fn a_benchmark_prints_what_mlx_lms_prints() {
    let user = User::new();
    for flags in [&["-b", "1"][..], &["-b", "3"]] {
        let sizes = ["benchmark", "-p", "20", "-g", "8", "-n", "2"];
        let output = user.run(&[sizes.as_slice(), flags].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let lines: Vec<String> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        let fields = |line: &str| -> Vec<String> {
            line.split([' ', ',']).filter_map(|word| Some(word.split_once('=')?.0.to_owned())).collect()
        };
        assert!(
            lines[0].starts_with("Trial 1:  prompt_tps=") && lines[2].starts_with("Averages: prompt_tps=")
        );
        assert_eq!(fields(&lines[1]), ["prompt_tps", "generation_tps", "peak_memory", "total_time"]);
        assert_eq!(fields(&lines[2]), ["prompt_tps", "generation_tps", "peak_memory"]);
        assert!(stderr(&output).contains("Running warmup..") && stderr(&output).contains("prompt_tokens=20"));

        let facts = user.json(&[sizes.as_slice(), flags].concat());
        assert_eq!((&facts["prompt_tokens"], &facts["generation_tokens"]), (&20.into(), &8.into()));
        let trials = facts["trials"].as_array().unwrap();
        assert_eq!(trials.len(), 2);
        for trial in trials.iter().chain([&facts["average"]]) {
            assert!(trial["prompt_tps"].as_f64() > Some(0.0) && trial["generation_tps"].as_f64() > Some(0.0));
            assert!(
                trial["peak_memory_bytes"].as_u64() > Some(100_000)
                    && trial["total_seconds"].as_f64() > Some(0.0)
            );
        }
    }
}

#[test]
fn perplexity_of_a_text() {
    let user = User::new();
    let text = user.home.path().join("text.txt");
    std::fs::write(&text, "What is 2 + 3? It is 5. ".repeat(20)).unwrap();
    let measure = ["perplexity", "--sequence-length", "32", "--data-path", text.to_str().unwrap()];
    let said = user.says(&measure);
    assert!(
        said.starts_with("Model: demo (") && said.contains("\nPerplexity: ") && said.contains(" ± "),
        "{said}"
    );
    let facts = user.json(&measure);
    let (samples, tokens) = (facts["samples"].as_u64().unwrap(), facts["tokens"].as_u64().unwrap());
    assert_eq!(tokens, samples * 31);
    assert!(
        facts["perplexity"].as_f64() > Some(1.0) && facts["standard_error"].as_f64() > Some(0.0),
        "{facts}"
    );
    assert!((900_000..1_100_000).contains(&facts["parameters"].as_u64().unwrap()), "{facts}");
    let note = stderr(&user.run(&measure));
    assert!(note.contains("note: the data has"), "{note}");

    let bad = user.home.path().join("bad.jsonl");
    std::fs::write(&bad, "{\"text\": \"a\"}\n{\"texts\": \"b\"}\n").unwrap();
    let folder = user.home.path().join("empty");
    std::fs::create_dir(&folder).unwrap();
    for (data, named) in [
        ("/no/such/file", "there is no file /no/such/file"),
        ("allenai/tulu-3-sft-mixture", "data sets of the hub cannot be read yet"),
        (bad.to_str().unwrap(), "bad.jsonl line 2: there is no \"text\""),
        (folder.to_str().unwrap(), "train.jsonl"),
        (text.to_str().unwrap(), "less than one row of 4096"),
    ] {
        let output = user.run(&["perplexity", "--sequence-length", "4096", "--data-path", data]);
        check_sentence(&output, &[data], named);
    }
}
