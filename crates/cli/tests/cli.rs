//! Whole runs of the binary that need no model: every failure is one clear line and an exit code.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    net::TcpListener,
    path::Path,
    process::{Command, Output},
};

use exrail_checkpoint::Gguf;
use exrail_tensor::DType;
use exrail_testkit::{TinyLlama, tiny_bert, tiny_llama};

fn exrail(home: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_exrail"))
        .args(arguments)
        .env("EXRAIL_HOME", home)
        .env("EXRAIL_OFFLINE", "true")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Exit code 1 and a message on standard error that holds every part.
fn fails(output: &Output, parts: &[&str]) {
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    for part in parts {
        assert!(message.contains(part), "expected `{part}` in: {message}");
    }
    assert!(!message.contains("panicked"), "{message}");
}

#[test]
fn every_command_explains_itself_and_wrong_usage_is_2() {
    let home = tempfile::tempdir().unwrap();
    let commands = [
        "serve",
        "chat",
        "ask",
        "ingest",
        "calibrate",
        "verify",
        "diagnose",
        "fix",
        "gateway",
        "probe",
        "embed",
        "pull",
        "inspect",
        "quantize",
        "bench",
        "plan",
        "devices",
        "demo",
        "boot",
        "preflight",
        "soak",
        "schema",
        "trace",
    ];
    for command in commands {
        let output = exrail(home.path(), &[command, "--help"]);
        assert!(output.status.success(), "{command}");
        assert!(text(&output.stdout).contains("--json"), "{command} has --json");
    }
    assert_eq!(exrail(home.path(), &["ask", "q", "--depth", "3"]).status.code(), Some(2));
    assert_eq!(exrail(home.path(), &["fly"]).status.code(), Some(2));
    for steps in ["0", "9", "two"] {
        let output = exrail(home.path(), &["ask", "q", "--steps", steps]);
        assert_eq!(output.status.code(), Some(2));
        let said = text(&output.stderr);
        assert!(said.contains("--steps") && said.contains(steps), "{said}");
    }
}

#[test]
fn a_calibration_is_none_unfit_or_void_and_each_is_told() {
    let home = tempfile::tempdir().unwrap();
    let at = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    tiny_bert(1, Path::new(&at("encoder"))).unwrap();
    std::fs::write(at("a.md"), "# Pages\n\nA page holds 256 tokens of the cache.\n").unwrap();
    let with = |arguments: &[&str]| {
        let more = ["--collection", "pages", "--encoder", &at("encoder"), "--json"];
        let output = exrail(home.path(), &[arguments, &more[..]].concat());
        let said = text(&output.stdout);
        let value: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        (output.status.code().unwrap(), value)
    };
    assert_eq!(exrail(home.path(), &["calibrate"]).status.code(), Some(2), "no gold set");
    assert_eq!(with(&["ingest", &at("a.md")]).0, 0);
    let (code, said) = with(&["calibrate", "--check"]);
    assert_eq!((code, &said["status"]), (3, &"none".into()), "{said}");

    let item = r#"{"id":"a","kind":"answerable","question":"How many tokens does a page hold?","paraphrases":["a page?","tokens of a page?","size of a page?"],"answers":["256"],"evidence":[{"doc":"a.md","quote":"256 tokens"}]}"#;
    std::fs::write(at("gold.jsonl"), item).unwrap();
    let (code, said) = with(&["calibrate", "--gold", &at("gold.jsonl")]);
    assert_eq!((code, &said["deciding"]), (3, &serde_json::Value::Null), "{said}");
    let reason = said["calibration"]["lexical"]["map"]["reason"].as_str().unwrap();
    assert!(reason.contains("50") && said["circular"] == true, "{said}");
    let (code, said) = with(&["calibrate", "--check", "--gold", &at("gold.jsonl")]);
    assert_eq!((code, &said["status"]), (0, &"valid".into()), "it holds, and decides nothing");

    std::fs::write(at("gold.jsonl"), item.replace("size of", "what size is")).unwrap();
    let (code, said) = with(&["calibrate", "--check", "--gold", &at("gold.jsonl")]);
    assert_eq!((code, &said["status"]), (3, &"void".into()), "{said}");
    assert!(said["reason"].as_str().unwrap().contains("`gold_sha256`"), "{said}");
}

#[test]
fn a_missing_model_is_named_with_what_there_is() {
    let home = tempfile::tempdir().unwrap();
    let output = exrail(home.path(), &["chat", "hi", "--model", "nowhere.gguf"]);
    fails(&output, &["nowhere.gguf", "no such file", "smollm2-135m-instruct"]);
    let output = exrail(home.path(), &["chat", "hi"]);
    fails(&output, &["smollm2-135m-instruct", "not in the cache", "exrail pull"]);
}

#[test]
fn a_gpu_is_used_or_refused_and_never_replaced() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("tiny.gguf");
    std::fs::write(&file, tiny_llama(1, TinyLlama::default())).unwrap();
    let model = file.to_str().unwrap();
    for command in [&["chat", "hi", "--model", model][..], &["bench", model]] {
        let output = exrail(home.path(), &[command, &["--device", "cuda:99"]].concat());
        // `bench` says it in its table, the others on standard error.
        let said = text(&output.stdout) + &text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        let expected = if cfg!(feature = "cuda") { "cuda" } else { "feature `cuda`" };
        assert!(said.to_lowercase().contains(expected) && !said.contains("panicked"), "{said}");
        let output = exrail(home.path(), &[command, &["--device", "gpu"]].concat());
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains("expected auto, cpu or cuda:N, found `gpu`"));
    }
    let output = exrail(home.path(), &["devices"]);
    assert!(output.status.success());
    assert!(text(&output.stdout).starts_with("cpu      cpu "), "{}", text(&output.stdout));
}

#[test]
fn a_damaged_model_is_one_line_that_names_it_once() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("cut.gguf");
    let whole = tiny_llama(1, TinyLlama::default());
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let path = file.to_str().unwrap();
    let output = exrail(home.path(), &["chat", "hi", "--model", path]);
    fails(&output, &["cut.gguf", "truncated"]);
    let message = text(&output.stderr);
    assert_eq!(message.lines().count(), 1, "{message}");
    assert_eq!(message.matches("cut.gguf").count(), 1, "{message}");
    fails(&exrail(home.path(), &["inspect", path]), &["cut.gguf", "truncated"]);
}

#[test]
fn inspect_prints_header_tensors_and_template() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("tiny.gguf");
    std::fs::write(&file, tiny_llama(1, TinyLlama::default())).unwrap();
    let output = exrail(home.path(), &["inspect", file.to_str().unwrap(), "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["format"], "GGUF");
    assert_eq!(json["metadata"]["general.architecture"], "llama");
    assert!(json["chat_template"].as_str().unwrap().contains("im_start"));
    assert!(json["tensors"].as_array().unwrap().len() > 10);
}

#[test]
fn a_tiny_model_chats_and_the_same_seed_says_the_same() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("tiny.gguf");
    std::fs::write(&file, tiny_llama(1, TinyLlama::default())).unwrap();
    let path = file.to_str().unwrap();
    let say =
        || exrail(home.path(), &["chat", "hi", "--model", path, "--max-tokens", "5", "--json"]);
    let (first, second) = (say(), say());
    assert!(first.status.success(), "{}", text(&first.stderr));
    let answer =
        |output: &Output| -> serde_json::Value { serde_json::from_slice(&output.stdout).unwrap() };
    assert_eq!(answer(&first)["answer"], answer(&second)["answer"]);
    assert_eq!(answer(&first)["completion_tokens"], 5);
}

#[test]
fn serve_refuses_a_taken_port_a_public_address_and_bad_keys() {
    let home = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = exrail(home.path(), &["serve", "--port", &port]);
    fails(&output, &["already in use", "--port"]);
    let output = exrail(home.path(), &["serve", "--host", "0.0.0.0", "--port", "0"]);
    fails(&output, &["0.0.0.0", "API key", "--api-key-file"]);
    let keys = home.path().join("keys");
    for (content, part) in [("# none\n", "found none"), ("short\n", "at least 16 characters")] {
        std::fs::write(&keys, content).unwrap();
        let arguments = ["serve", "--port", "0", "--api-key-file", keys.to_str().unwrap()];
        fails(&exrail(home.path(), &arguments), &[part]);
    }
}

#[test]
fn a_collection_that_is_not_there_says_how_to_make_one() {
    let home = tempfile::tempdir().unwrap();
    let output = exrail(home.path(), &["ingest", "no/such/page.md"]);
    fails(&output, &["no/such/page.md"]);
    let empty = home.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    fails(&exrail(home.path(), &["ingest", empty.to_str().unwrap()]), &["expected .md", "none"]);
}

#[test]
fn a_folder_is_quantised_once_and_what_cannot_be_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/families");
    let source = families.join("llama").display().to_string();
    let destination = home.path().join("int4").display().to_string();
    let quantize = |more: &[&str]| exrail(home.path(), &[&["quantize"], more].concat());
    let output = quantize(&[&source, &destination, "--mode", "int4", "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("\"bits\":4"), "{}", text(&output.stdout));
    assert!(home.path().join("int4/exrail-quantize.json").is_file());
    let output = quantize(&[&source, &destination, "--mode", "int4"]);
    fails(&output, &["int4", "exists already"]);
    let other = home.path().join("other").display().to_string();
    fails(&quantize(&[&destination, &other, "--mode", "int8"]), &["quantised already"]);
    let gguf = families.join("llama/model.gguf").display().to_string();
    fails(&quantize(&[&gguf, &other, "--mode", "int8"]), &["model.gguf", "--quant"]);
    let short = home.path().join("short.txt");
    std::fs::write(&short, "too short").unwrap();
    let short = short.display().to_string();
    let output = quantize(&[&source, &other, "--mode", "int4", "--calibrate", &short]);
    fails(&output, &["calibration text", "2048"]);
    // Threads are those of a calibration: without one they would do nothing.
    for option in [["--group", "48"], ["--threads", "2"]] {
        let usage = quantize(&[&[&source[..], &other, "--mode", "int4"], &option[..]].concat());
        assert_eq!(usage.status.code(), Some(2), "{option:?}");
    }
}

#[test]
fn inspect_check_says_whether_a_folder_would_load() {
    let home = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden");
    let check = |path: &Path| {
        exrail(home.path(), &["inspect", "--check", "--json", path.to_str().unwrap()])
    };
    let output = check(&golden.join("families/qwen3"));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&json["loads"], &json["architecture"]), (&true.into(), &"qwen3".into()));
    fails(&check(&golden.join("quantised/gptq")), &["tokenizer.json", "expected"]);
    let broken = home.path().join("broken");
    std::fs::create_dir(&broken).unwrap();
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(golden.join("families/qwen3").join(file), broken.join(file)).unwrap();
    }
    fails(&check(&broken), &["broken"]);
}

#[test]
fn a_closed_pipe_ends_a_command_without_a_panic() {
    let home = tempfile::tempdir().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/families/llama");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_exrail"))
        .args(["inspect", folder.to_str().unwrap()])
        .env("EXRAIL_HOME", home.path())
        .stdout(writer)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(141));
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn a_split_model_is_inspected_checked_and_run_from_its_first_part() {
    let home = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/split");
    let names = [1, 2, 3].map(|number| format!("tiny-0000{number}-of-00003.gguf"));
    for name in &names {
        std::fs::copy(golden.join(name), home.path().join(name)).unwrap();
    }
    let paths = names.each_ref().map(|name| home.path().join(name).display().to_string());
    let json = |arguments: &[&str]| -> serde_json::Value {
        let output = exrail(home.path(), &[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let inspected = json(&["inspect", &paths[0]]);
    let lens = names.each_ref().map(|name| golden.join(name).metadata().unwrap().len());
    assert_eq!(inspected["file_bytes"], lens.iter().sum::<u64>());
    for (i, n_tensors) in [9, 9, 4].into_iter().enumerate() {
        let part = serde_json::json!({ "file": names[i], "tensors": n_tensors, "bytes": lens[i] });
        assert_eq!(inspected["parts"][i], part);
    }
    assert_eq!(inspected["tensors"].as_array().unwrap().len(), 22);
    let checked = json(&["inspect", "--check", &paths[0]]);
    assert_eq!((&checked["loads"], &checked["tensors"]), (&true.into(), &22.into()));
    assert_eq!(checked["parts"], inspected["parts"]);
    let shown = exrail(home.path(), &["inspect", "--check", &paths[0]]);
    assert!(text(&shown.stdout).contains("parts     3, 0.2 MB together"), "{shown:?}");
    let said = json(&["chat", "hi", "--model", &paths[0], "--max-tokens", "5"]);
    assert_eq!(said["completion_tokens"], 5);

    let commands: [&[&str]; 3] =
        [&["inspect"], &["inspect", "--check"], &["chat", "hi", "--model"]];
    for command in commands {
        let run = |path: &str| exrail(home.path(), &[command, &[path]].concat());
        fails(&run(&paths[1]), &["part 2 of 3", "expected the first part", &paths[0]]);
        let aside = format!("{}.part", paths[2]);
        std::fs::rename(&paths[2], &aside).unwrap();
        fails(&run(&paths[0]), &["part 3 of 3 is missing", &paths[2], "download it too"]);
        std::fs::rename(&aside, &paths[2]).unwrap();
    }
    let quantize = ["quantize", &paths[0], "out", "--mode", "int8"];
    fails(&exrail(home.path(), &quantize), &[&names[0], "--quant"]);
}

/// Copies a folder of a tiny model and adds a file that nothing reads but the hash: sparse, so that it
/// takes no room, and a minute of hashing.
fn slow_to_hash(home: &Path) -> std::path::PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/families/llama");
    let dir = home.join("slow");
    std::fs::create_dir(&dir).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
    }
    std::fs::File::create(dir.join("a.json")).unwrap().set_len(64 << 30).unwrap();
    dir
}

#[test]
fn a_command_answers_and_ends_before_its_model_is_hashed() {
    let home = tempfile::tempdir().unwrap();
    let dir = slow_to_hash(home.path());
    let since = std::time::Instant::now();
    let arguments = ["chat", "hi", "--device", "cpu", "--max-tokens", "3", "--kv-pages", "1"];
    let output =
        exrail(home.path(), &[&arguments[..], &["--model", dir.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let took = since.elapsed();
    assert!(took < std::time::Duration::from_secs(20), "{took:?}");
}

#[test]
fn a_plan_is_a_table_and_a_verdict_and_loading_refuses_by_the_same_arithmetic() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("tiny.gguf");
    std::fs::write(&file, tiny_llama(1, TinyLlama::default())).unwrap();
    let model = file.to_str().unwrap();
    let plan = |more: &[&str]| exrail(home.path(), &[&["plan", model], more].concat());
    let json = |output: &Output| -> serde_json::Value {
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
    };
    let cpu = ["--device", "cpu", "--kv-pages", "9"];
    let shown = plan(&cpu);
    let table = text(&shown.stdout);
    assert!(shown.status.success(), "{shown:?}");
    for part in ["tiny on cpu", "embedding", "KV cache f16, 9 pages", "activations of", "total"] {
        assert!(table.contains(part), "expected `{part}` in {table}");
    }
    let value = json(&plan(&[&cpu[..], &["--json", "--memory", "1TiB"]].concat()));
    assert_eq!((&value["verdict"], &value["free_basis"]), (&"fits".into(), &"--memory".into()));
    let total = value["total_bytes"]["most"].as_u64().unwrap();
    let parts = value["parts"].as_array().unwrap();
    assert_eq!(
        parts.iter().map(|part| part["bytes"]["most"].as_u64().unwrap()).sum::<u64>(),
        total
    );
    assert_eq!(value["left_bytes"].as_u64(), Some((1 << 40) - total));

    let short = (total - 1).to_string();
    let refused = plan(&[&cpu[..], &["--json", "--memory", &short]].concat());
    assert_eq!(refused.status.code(), Some(3));
    let value = json(&refused);
    assert_eq!((&value["verdict"], &value["short_bytes"]), (&"does_not_fit".into(), &1.into()));
    assert_eq!(value["change"]["options"], "--kv-pages 8");
    let chat = |memory: &str| {
        let arguments = ["chat", "hi", "--model", model, "--max-tokens", "2", "--memory", memory];
        exrail(home.path(), &[&arguments[..], &cpu].concat())
    };
    let parts =
        ["memory of cpu", "--memory", "KV cache f16, 9 pages", "--kv-pages 8", "exrail plan"];
    fails(&chat(&short), &parts);
    assert!(chat(&total.to_string()).status.success());
}

#[test]
fn a_gpu_that_is_not_here_is_planned_for() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("tiny.gguf");
    std::fs::write(&file, tiny_llama(1, TinyLlama::default())).unwrap();
    let arguments = ["plan", file.to_str().unwrap(), "--device", "cuda:7", "--json"];
    let plan = |more: &[&str]| -> serde_json::Value {
        let output = exrail(home.path(), &[&arguments[..], more].concat());
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let given = plan(&["--memory", "24GiB"]);
    assert_eq!((&given["verdict"], &given["device"]), (&"fits".into(), &"cuda:7".into()));
    assert!(given["reserve_basis"].as_str().unwrap().contains("driver's context"));
    let unknown = plan(&[]);
    assert_eq!(
        (&unknown["verdict"], &unknown["free_bytes"]),
        (&"not_available".into(), &().into())
    );
    assert!(unknown["reason"].as_str().unwrap().to_lowercase().contains("cuda"), "{unknown}");
    let bad = exrail(home.path(), &[&arguments[..], &["--memory", "much"]].concat());
    assert_eq!(bad.status.code(), Some(2));
}

#[test]
fn a_cache_is_probed_and_too_little_text_is_named() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("tiny.gguf");
    std::fs::write(&model, tiny_llama(7, TinyLlama::default())).unwrap();
    let text = home.path().join("text.txt");
    let probe = |extra: &[&str]| {
        let mut arguments = vec!["probe", "cache", model.to_str().unwrap(), "--device", "cpu"];
        arguments.extend(["--text", text.to_str().unwrap(), "--json"]);
        arguments.extend(extra);
        exrail(home.path(), &arguments)
    };
    std::fs::write(&text, "too little").unwrap();
    fails(&probe(&["--tokens", "2048"]), &["`text`", "as many tokens as are probed, found"]);
    fails(&probe(&["--tokens", "2047"]), &["`tokens`", "at least 2048, found 2047"]);
    std::fs::write(&text, "Six keys lie in the box of cabinet B. ".repeat(200)).unwrap();
    let output = probe(&["--tokens", "2048"]);
    let line = last_line(&output);
    assert_eq!(output.status.code(), Some(0), "{line}");
    let report: serde_json::Value = serde_json::from_str(&line).unwrap();
    let cache = &report["cache"];
    assert_eq!((&cache["verdict"], &cache["tokens"]), (&"pass".into(), &2048.into()));
    assert_eq!(cache["tokens_until_drift"], ">= 2048");
    assert_eq!(cache["checkpoints"].as_array().unwrap().len(), 8);
    assert!(cache["oracle_kl_max"].as_f64().unwrap() < 1e-6, "the CPU has no noise");
    assert!(report["advice"].is_null());
}

fn last_line(output: &Output) -> String {
    text(&output.stdout).lines().last().unwrap_or_default().to_owned()
}

#[test]
fn a_boot_plan_is_printed_in_order_and_starts_nothing() {
    let home = tempfile::tempdir().unwrap();
    let plan = |more: &[&str]| {
        let arguments = [&["boot", "--plan", "--model", "nowhere.gguf"], more].concat();
        let output = exrail(home.path(), &arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let json: serde_json::Value = serde_json::from_str(&plan(&["--json"])).unwrap();
    let order = json["order"].as_array().unwrap();
    let at = |phase: &str| order.iter().position(|node| node["phase"] == phase).unwrap();
    for node in order {
        for need in node["needs"].as_array().unwrap() {
            assert!(at(need.as_str().unwrap()) < at(node["phase"].as_str().unwrap()), "{node}");
        }
        assert!(!node["probe"].as_str().unwrap().is_empty(), "{node}");
    }
    assert_eq!(order.last().unwrap()["phase"], "ready");
    let table = plan(&[]);
    assert!(table.contains("warmup     kv_pool"), "{table}");
    assert!(!plan(&["--no-encoder"]).contains("encoder"));
}

#[test]
fn a_boot_runs_the_phases_of_its_plan_and_ends() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("tiny.gguf");
    std::fs::write(&file, tiny_llama(1, TinyLlama::default())).unwrap();
    let arguments = ["boot", "--no-encoder", "--model", file.to_str().unwrap(), "--json"];
    let names = |more: &str, list: &str| -> Vec<String> {
        let output = exrail(home.path(), &[&arguments[..], &[more]].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let list = json[list].as_array().unwrap();
        list.iter().map(|it| it["phase"].as_str().unwrap().to_owned()).collect()
    };
    let mut planned = names("--plan", "order");
    assert_eq!(planned.pop().unwrap(), "ready", "nobody is served");
    assert_eq!(names("--batch-invariant", "phases"), planned);
    fails(&exrail(home.path(), &["boot", "--model", "nowhere.gguf"]), &["nowhere.gguf"]);
    let open_to_all = ["boot", "--plan", "--host", "0.0.0.0"];
    fails(&exrail(home.path(), &open_to_all), &["0.0.0.0", "pass --api-key-file FILE"]);
}

#[test]
fn a_variable_that_is_nearly_one_of_ours_is_refused_without_its_value() {
    let home = tempfile::tempdir().unwrap();
    let run = |name: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exrail"));
        command.args(["devices"]).env("EXRAIL_HOME", home.path()).env(name, "s3cret");
        command.output().unwrap()
    };
    let output = run("EXRAIL_API_KEY_FIEL");
    fails(&output, &["expected `EXRAIL_API_KEY_FILE`, found `EXRAIL_API_KEY_FIEL`", "unset it"]);
    assert!(!text(&output.stderr).contains("s3cret"));
    // The mutation: a name that the check does not know as near is read by nobody, and nothing says so.
    assert!(run("EXRAIL_KEYS").status.success());
}

/// The mutation: what a misspelt name asks for is not done, and nothing says so. The right name asks for an
/// address that needs keys; a wrong one that the check does not see leaves the server where it was.
#[test]
fn mutation_without_the_check_of_names_a_misspelt_option_is_ignored() {
    let home = tempfile::tempdir().unwrap();
    let plan = |name: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exrail"));
        command.args(["boot", "--plan"]).env("EXRAIL_HOME", home.path()).env(name, "0.0.0.0");
        command.output().unwrap()
    };
    fails(&plan("EXRAIL_HOST"), &["0.0.0.0", "pass --api-key-file FILE"]);
    fails(&plan("EXRAIL_HSOT"), &["expected `EXRAIL_HOST`, found `EXRAIL_HSOT`"]);
    assert!(plan("EXRAIL_LISTEN_ADDRESS").status.success());
}

/// Writes the manifest of a tiny model; returns the paths of both.
fn tiny_with_manifest(home: &Path) -> (String, String) {
    let [model, manifest] = ["tiny.gguf", "model.manifest.json"].map(|name| home.join(name));
    std::fs::write(&model, tiny_llama(1, TinyLlama::default())).unwrap();
    let [model, manifest] = [model, manifest].map(|path| path.to_str().unwrap().to_owned());
    let output = exrail(home, &["preflight", &model, "--write", &manifest]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    (model, manifest)
}

#[test]
fn a_model_that_is_not_what_its_manifest_declares_is_not_loaded() {
    let home = tempfile::tempdir().unwrap();
    let (model, manifest) = tiny_with_manifest(home.path());
    let preflight = || exrail(home.path(), &["preflight", &model, "--manifest", &manifest]);
    let boot = |more: &[&str]| {
        let arguments =
            ["boot", "--no-encoder", "--model", &model, "--manifest", &manifest, "--json"];
        exrail(home.path(), &[&arguments[..], more].concat())
    };
    assert!(preflight().status.success());
    let booted = text(&boot(&[]).stdout);
    assert!(booted.contains("values agree"), "{booted}");

    // The same sizes and tokens, and other weights (field fault G3: what the header says is not enough).
    std::fs::write(&model, tiny_llama(2, TinyLlama::default())).unwrap();
    let refused = preflight();
    assert_eq!(refused.status.code(), Some(3));
    let table = text(&refused.stdout);
    assert!(table.contains("files.gguf.sha256") && table.contains("REFUSED"), "{table}");
    for more in [&[][..], &["--force", "we know"]] {
        fails(&boot(more), &["1 hard mismatches", "files.gguf.sha256", "nothing overrides it"]);
    }
    // The mutation: without a manifest it is served.
    let arguments = ["boot", "--no-encoder", "--model", &model];
    assert!(exrail(home.path(), &arguments).status.success());
}

/// G-09: the files are those of the manifest, and what is computed of them is not what it was.
#[test]
fn a_model_that_computes_something_else_than_its_manifest_keeps_is_not_served() {
    let home = tempfile::tempdir().unwrap();
    let (model, manifest) = tiny_with_manifest(home.path());
    let probe = |model: &str, manifest: &str, more: &[&str]| {
        let arguments = ["probe", "distributions", model, "--manifest", manifest];
        exrail(home.path(), &[&arguments[..], more].concat())
    };
    let boot = || {
        let arguments = ["boot", "--no-encoder", "--model", &model, "--manifest", &manifest];
        exrail(home.path(), &arguments)
    };
    fails(
        &probe(&model, &manifest, &[]),
        &["expected golden distributions, found none", "--write"],
    );
    let written = probe(&model, &manifest, &["--write"]);
    assert!(written.status.success(), "{}", text(&written.stderr));
    let same = probe(&model, &manifest, &[]);
    assert!(same.status.success(), "{}", text(&same.stderr));
    assert!(text(&same.stdout).contains("32 places"), "{}", text(&same.stdout));
    let booted = text(&boot().stdout);
    assert!(booted.contains("32 golden distributions within"), "{booted}");

    // What other weights compute of the same text stands for kernels that compute something else of these.
    let [other, others] = ["other.gguf", "other.manifest.json"].map(|name| home.path().join(name));
    std::fs::write(&other, tiny_llama(2, TinyLlama::default())).unwrap();
    let [other, others] = [other, others].map(|path| path.to_str().unwrap().to_owned());
    assert!(exrail(home.path(), &["preflight", &other, "--write", &others]).status.success());
    assert!(probe(&other, &others, &["--write"]).status.success());
    let read = |path: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    };
    let mut grafted = read(&manifest);
    grafted["distributions"] = read(&others)["distributions"].take();
    std::fs::write(&manifest, grafted.to_string()).unwrap();
    let probed = probe(&model, &manifest, &[]);
    assert_eq!(probed.status.code(), Some(3), "{}", text(&probed.stderr));
    fails(&boot(), &["golden distributions: expected a KL divergence of at most 0.02 nats"]);

    grafted["distributions"]["places"] = serde_json::json!([]);
    std::fs::write(&manifest, grafted.to_string()).unwrap();
    fails(&boot(), &["model.manifest.json", "expected 32 places, found 0"]);

    // The mutation: without them it is served.
    grafted.as_object_mut().unwrap().remove("distributions");
    std::fs::write(&manifest, grafted.to_string()).unwrap();
    assert!(boot().status.success());
}

/// The same weights in blocks, the scales of one matrix doubled.
fn one_layer_with_wrong_scales_is_named(home: &Path) {
    let spec = TinyLlama { n_layers: 4, ..TinyLlama::default() };
    let mut blocks = tiny_llama(3, TinyLlama { dtype: DType::Q8_0, ..spec });
    let [exact, broken] = ["exact.gguf", "broken.gguf"].map(|name| home.join(name));
    std::fs::write(&exact, tiny_llama(3, spec)).unwrap();
    std::fs::write(&broken, &blocks).unwrap();
    let gguf = Gguf::open(&broken).unwrap();
    let matrix = gguf.tensor("blk.2.ffn_up.weight").unwrap().bytes.to_vec();
    drop(gguf);
    let at = blocks.windows(matrix.len()).position(|bytes| bytes == matrix).unwrap();
    for scale in blocks[at..at + matrix.len()].chunks_exact_mut(34) {
        // Of an f16 the next exponent is twice the value.
        scale[1] += 4;
    }
    std::fs::write(&broken, blocks).unwrap();
    let [exact, broken] = [exact, broken].map(|path| path.to_str().unwrap().to_owned());
    let arguments =
        ["probe", "quant", &exact, "--device", "cpu", "--tokens", "128", "--window", "64"];
    let more = ["--modes", "as-served", "--against", &broken];
    let told = text(&exrail(home, &[&arguments[..], &more].concat()).stdout);
    assert!(told.contains("stands out: blk.2.ffn_up.weight"), "{told}");
    assert_eq!(told.matches("stands out").count(), 1, "{told}");
}

#[test]
fn widths_are_compared_with_the_model_that_they_are_of() {
    let home = tempfile::tempdir().unwrap();
    let [model, other] = [(1, "model.gguf"), (2, "other.gguf")].map(|(seed, name)| {
        let path = home.path().join(name);
        std::fs::write(&path, tiny_llama(seed, TinyLlama::default())).unwrap();
        path.to_str().unwrap().to_owned()
    });
    let probe = |more: &[&str]| {
        let arguments = ["probe", "quant", &model, "--device", "cpu", "--tokens", "256"];
        exrail(home.path(), &[&arguments[..], &["--window", "64"], more].concat())
    };
    let compared = probe(&["--against", &other, "--json"]);
    // The limits are for large models, so that nothing passes here.
    assert_eq!(compared.status.code(), Some(3), "{}", text(&compared.stderr));
    let found: serde_json::Value = serde_json::from_slice(&compared.stdout).unwrap();
    let fidelity = &found["fidelity"];
    let mean = |mode: &str| fidelity["texts"][0]["modes"][mode]["kld_mean"].as_f64().unwrap();
    assert!(mean("int8") < mean("int4") && mean("int4") < mean("against"), "{fidelity}");
    assert!(mean("as_served") < mean("int4"), "{fidelity}");
    assert_eq!(fidelity["texts"][0]["tokens"], 256);
    assert_eq!(fidelity["noise"]["kld_max"], 0.0, "the CPU computes a row as it does in a batch");
    assert_eq!(
        (&fidelity["ordered"], &fidelity["verdict"]),
        (&true.into(), &"inconclusive".into())
    );
    let losses = |mode: &str| found["rounding"][mode].as_array().unwrap().clone();
    assert!(losses("int8").len() == losses("int4").len() && losses("int8").len() > 7, "{found}");
    for (fine, coarse) in losses("int8").iter().zip(losses("int4")) {
        let [fine, coarse] = [fine, &coarse].map(|loss| loss["sqnr_db"].as_f64().unwrap());
        assert!(fine >= coarse && coarse > 10.0, "{found}");
    }
    // Another seed, another model: all of its matrices, none more than the others.
    assert!(losses("against").len() > 7 && found["stand_out"]["against"] == serde_json::json!([]));
    assert!(
        losses("against").iter().all(|loss| loss["sqnr_db"].as_f64().unwrap() < 0.0),
        "{found}"
    );
    // Its own past is a scale: the same passes, and what was nearer then does not.
    let past = home.path().join("past.json");
    let baseline = |report: &serde_json::Value| {
        std::fs::write(&past, report.to_string()).unwrap();
        probe(&["--against", &other, "--baseline", past.to_str().unwrap()])
    };
    let same = baseline(&found);
    assert!(same.status.success(), "{}", text(&same.stdout));
    let mut nearer = found.clone();
    nearer["fidelity"]["texts"][0]["modes"]["int4"]["kld_mean"] = (mean("int4") / 1.3).into();
    let grown = baseline(&nearer);
    assert_eq!(grown.status.code(), Some(3));
    assert!(text(&grown.stdout).contains("verdict            review"), "{grown:?}");
    fails(
        &baseline(&serde_json::json!({})),
        &["past.json", "expected what `exrail probe quant --json`"],
    );
    nearer["fidelity"]["texts"][0]["ids_sha256"] = "00".into();
    fails(&baseline(&nearer), &["baseline: expected the texts and models", "(ids 00)"]);
    // What is served in exact arithmetic is the reference, but for a cache of 16 bits, and is not left out.
    let exact =
        text(&probe(&["--modes", "as-served", "--activation", "f32", "--kv", "f32"]).stdout);
    assert!(exact.contains("as_served      0.0000") && exact.contains("100.0 %"), "{exact}");
    let table = text(&probe(&["--modes", "int8,int4"]).stdout);
    for part in ["noise floor", "int4 vs int8", "worst of", "not calibrated", "3 billion"] {
        assert!(table.contains(part), "{part}: {table}");
    }

    one_layer_with_wrong_scales_is_named(home.path());

    let short = home.path().join("short.txt");
    std::fs::write(&short, "Too short.").unwrap();
    let short = short.to_str().unwrap();
    fails(&probe(&["--text", short]), &["expected at least --window 64 tokens, found"]);
    fails(&probe(&["--quant", "int8"]), &["choose with --modes"]);
    let narrow = ["probe", "quant", &model, "--tokens", "256", "--window", "300"];
    fails(&exrail(home.path(), &narrow), &["--window 300", "expected 2 to --tokens, which is 256"]);
    fails(&probe(&["--text", "missing.txt"]), &["text missing.txt"]);
}

#[test]
fn a_lambda_probe_refuses_what_it_could_not_honour() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("model.gguf");
    std::fs::write(&model, tiny_llama(1, TinyLlama::default())).unwrap();
    let model = model.to_str().unwrap();
    let probe = |more: &[&str]| {
        let arguments = ["probe", "lambda", model, "--gold", "nowhere.jsonl"];
        exrail(home.path(), &[&arguments[..], more].concat())
    };
    fails(&probe(&[]), &["gold set nowhere.jsonl"]);
    fails(&probe(&["--quant", "int8"]), &["--quant: expected none", "choose with --modes"]);
    for modes in ["int8,int4", "as-served"] {
        fails(&probe(&["--modes", modes]), &["--modes: expected as-served", "at least one other"]);
    }
    assert_eq!(probe(&["--modes", "int3"]).status.code(), Some(2));
    let without = exrail(home.path(), &["probe", "lambda", model]);
    assert_eq!(without.status.code(), Some(2));
    assert!(text(&without.stderr).contains("--gold"), "{without:?}");
}

#[test]
fn a_page_is_printed_by_the_name_that_a_report_has() {
    let home = tempfile::tempdir().unwrap();
    let listed = exrail(home.path(), &["fix"]);
    let listed = text(&listed.stdout);
    // Every page that the first choice of a fix can name.
    for page in [
        "bootstrap-ordering",
        "chunking-checklist",
        "embedding-vs-semantic",
        "logic-collapse",
        "retrieval-playbook",
        "retrieval-traceability",
    ] {
        assert!(listed.contains(page), "{page}: {listed}");
        let printed = exrail(home.path(), &["fix", page]);
        let printed = text(&printed.stdout);
        assert!(printed.starts_with("# ") && printed.contains("## How to confirm"), "{printed}");
    }
    let guard = exrail(home.path(), &["fix", "g-17", "--json"]);
    let guard: serde_json::Value = serde_json::from_slice(&guard.stdout).unwrap();
    assert_eq!((&guard["guard"], &guard["page"]), (&"G-17".into(), &"kv-integrity".into()));
    let background = exrail(home.path(), &["fix", "chunking-checklist", "--background"]);
    assert!(text(&background.stdout).contains("## How to verify"), "{background:?}");
    fails(&exrail(home.path(), &["fix", "chunking"]), &["page `chunking`", "chunking-checklist"]);
}

#[test]
fn a_soft_mismatch_is_refused_and_overlooked_with_a_reason() {
    let home = tempfile::tempdir().unwrap();
    let (model, manifest) = tiny_with_manifest(home.path());
    let written = std::fs::read_to_string(&manifest).unwrap();
    let build = concat!("exrail-", env!("CARGO_PKG_VERSION"));
    std::fs::write(&manifest, written.replace(build, "exrail-0.0.0")).unwrap();
    let boot = |more: &[&str]| {
        let arguments = ["boot", "--no-encoder", "--model", &model, "--manifest", &manifest];
        exrail(home.path(), &[&arguments[..], more].concat())
    };
    fails(
        &boot(&[]),
        &["1 soft mismatches", "soft.engine_build", "exrail-0.0.0", "--force REASON"],
    );
    let forced = boot(&["--force", "tested by hand"]);
    assert!(forced.status.success(), "{forced:?}");
    assert!(text(&forced.stdout).contains("1 soft mismatches overlooked: tested by hand"));
    assert!(text(&forced.stderr).contains("tested by hand"), "it is logged");
    for wrong in [&["--force", ""][..], &["--force"]] {
        assert_eq!(boot(wrong).status.code(), Some(2));
    }
}

/// Field fault A4: a phase that hangs for ever, here at a manifest that is a pipe nobody writes to. The process
/// ends by itself and says which phase it was and who waited for it.
#[test]
fn a4_a_phase_that_hangs_is_named_and_ends_the_process() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("tiny.gguf");
    std::fs::write(&model, tiny_llama(1, TinyLlama::default())).unwrap();
    let pipe = home.path().join("manifest");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let since = std::time::Instant::now();
    let (model, pipe) = (model.to_str().unwrap(), pipe.to_str().unwrap());
    let arguments = ["boot", "--no-encoder", "--model", model, "--manifest", pipe];
    let output = exrail(home.path(), &arguments);
    let parts = [
        "boot phase `preflight`: expected progress within 30 s",
        "`weights` waits for preflight, device",
        "`ready` waits for sentinel",
        "--boot-patience",
    ];
    fails(&output, &parts);
    assert!(since.elapsed() < std::time::Duration::from_secs(90), "{:?}", since.elapsed());
}

/// A report as far as a comparison looks at it.
fn report(home: &Path, name: &str, model: &str, index: &str, status: &str) -> String {
    let pins = format!(
        r#"{{"model_fp":"{model}","tok_fp":"t","encoder_fp":"e","index_hash":"{index}","template_hash":"p","engine_build":"b","gold_sha256":"g"}}"#
    );
    let gates = format!(r#"[{{"name":"coverage","status":"{status}","value":0.9}}]"#);
    let text =
        format!(r#"{{"report_version":"1.0","pins":{pins},"gates":{gates},"verdict":"{status}"}}"#);
    let file = home.join(name);
    std::fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn diagnoses_are_compared_gate_by_gate_and_another_changed_pin_refuses() {
    let home = tempfile::tempdir().unwrap();
    let a = report(home.path(), "a.json", "m1", "i1", "pass");
    let b = report(home.path(), "b.json", "m2", "i1", "review");
    let c = report(home.path(), "c.json", "m2", "i2", "pass");
    let compare = |more: &[&str]| exrail(home.path(), &[&["diagnose", "--compare"], more].concat());
    let worse = compare(&[&a, &b]);
    assert_eq!(worse.status.code(), Some(3), "{}", text(&worse.stderr));
    assert!(text(&worse.stdout).contains("worse: coverage"));
    assert_eq!(compare(&[&b, &a]).status.code(), Some(0));
    fails(&compare(&[&a, &c]), &["differ in model_fp alone", "index_hash i1 and i2"]);
    fails(&compare(&[&a, "nowhere.json"]), &["nowhere.json"]);
    assert_eq!(compare(&[&b, &c, "--under-test", "index_hash"]).status.code(), Some(0));
    let wrong = [
        &["--under-test", "gold_sha256"][..],
        &["--question", "q"],
        &["--gold", "g"],
        &["--deep"],
        &["--modes", "int8"],
        &["--answered", "3"],
        &["--sample-seed", "1"],
        &["--threads", "1"],
        &["--model", "m.gguf"],
        &["--manifest", "m.json"],
        &["--offline"],
    ];
    for wrong in wrong {
        let arguments = [&[a.as_str(), b.as_str()][..], wrong].concat();
        assert_eq!(compare(&arguments).status.code(), Some(2), "{wrong:?}");
    }
    // What this machine prefers is no option of the command line.
    let mut preferred = Command::new(env!("CARGO_BIN_EXE_exrail"));
    preferred.args(["diagnose", "--compare", &b, &a]).env("EXRAIL_HOME", home.path());
    preferred.env("EXRAIL_MODEL", "m.gguf").env("EXRAIL_MANIFEST", "m.json");
    assert_eq!(preferred.output().unwrap().status.code(), Some(0));
    assert_eq!(exrail(home.path(), &["diagnose", "--gold", "g.jsonl"]).status.code(), Some(2));
}
