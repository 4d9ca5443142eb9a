//! G-14 and G-15 from outside: what breaks the contract is not written, and what is not live cannot be cited.

use exrail_engine::Sampling;
use exrail_retrieval::Hit;
use exrail_server::{
    Services, TraceError, TraceIdentity, TraceLog, TraceMode,
    pipeline::{AnswerLock, EngineGenerate},
};
use exrail_text::Specials;
use exrail_verify::{
    AskPolicy, DeltaSGate, Generate, Live, Nonce, PromptFrame, RefusalReason, conclude,
    evidence_ds, parse_answer, retrieve, trace::Rule,
};
use exrail_wire::{Pins, QueryRecord, RetrievedItem, TraceBody, schemas};
use serde_json::json;

use crate::support::{Server, services, warm};

const QUESTION: &str = "Where is the key?";

fn hits(services: &Services) -> Vec<Hit> {
    let hits = retrieve(services.collections["cabinets"].index(), QUESTION, &AskPolicy::default());
    let hits = hits.unwrap();
    assert_eq!(hits.len(), 2);
    hits
}

fn frame(hits: &[Hit]) -> PromptFrame {
    PromptFrame::new(QUESTION, Live::new(hits), &Nonce::derive(&[b"x"])).unwrap()
}

/// A model that prefers these characters wherever it may write them.
fn preferring(services: &Services, characters: &[(&str, f32)]) -> Sampling {
    let id = |text: &str| {
        let ids = services.engine.tokenizer().encode(text, Specials::AsText).unwrap();
        *ids.last().unwrap()
    };
    let logit_bias = characters.iter().map(|(text, bias)| (id(text), *bias)).collect();
    Sampling { logit_bias, ..Sampling::greedy() }
}

#[tokio::test]
async fn every_record_of_a_server_is_published_and_agrees_with_the_collection() {
    let server = warm(&[], None);
    server.post("/v1/ask", &json!({"question": QUESTION})).await;
    server.post("/v1/ask", &json!({"question": QUESTION, "k": 1, "max_tokens": 1})).await;
    server.post("/v1/completions", &json!({"prompt": "ab", "tools": []})).await;
    server.state.record_boot().await.unwrap();
    let lines = server.trace_lines();
    let answer = lines.iter().find(|line| line["event"] == "answer.decide").unwrap();
    let item = &answer["retrieved"][0];
    assert_eq!(item["snippet_id"].as_str().unwrap().len(), 16);
    assert!(item["section_id"].is_string() && item["tokens"].as_u64().unwrap() > 0);
    assert_eq!(answer["pins"]["schema_hash"], schemas::SHA256);
    assert_eq!(answer["prompt"]["citations"].as_array().unwrap().len(), 2);
    assert!(lines.iter().any(|line| line["event"] == "boot.phase"));
}

/// The model wants to cite a ninth source of two.
#[test]
fn an_unknown_label_cannot_be_sampled() {
    let folder = tempfile::tempdir().unwrap();
    let services = services(folder.path());
    let hits = hits(&services);
    let prompt = frame(&hits);
    let greedy = preferring(&services, &[("[", 50.0), ("9", 100.0)]);
    let hot =
        Sampling { temperature: 1.5, logit_bias: greedy.logit_bias.clone(), ..Sampling::default() };
    let mut n_cited = 0;
    for (sampling, seeds) in [(greedy, 0..1), (hot, 1..9)] {
        for seed in seeds {
            let generator = EngineGenerate::new(&services.engine, sampling.clone(), 40);
            let reply = generator.generate(&prompt, seed).unwrap();
            let parsed = parse_answer(&reply.text, prompt.live());
            assert_eq!(parsed.unknown_citations, [], "{}", reply.text);
            let begins = ["[S1]", "[S2]", "not in context"];
            assert!(begins.iter().any(|begin| reply.text.starts_with(begin)), "{}", reply.text);
            n_cited += usize::from(reply.text.starts_with('['));
        }
    }
    assert!(n_cited > 0, "the model never cited");
}

/// The mutation: without the lock the model writes what it prefers, and nothing of it is a citation.
#[test]
fn mutation_without_the_lock_the_model_writes_what_it_likes() {
    let folder = tempfile::tempdir().unwrap();
    let services = services(folder.path());
    let sampling = preferring(&services, &[("9", 100.0)]);
    let prompt = frame(&hits(&services));
    let generator = EngineGenerate::new(&services.engine, sampling, 12).locked(AnswerLock::Off);
    let reply = generator.generate(&prompt, 1).unwrap();
    assert!(reply.text.starts_with("999"), "{}", reply.text);
}

/// The mutation: a lock over nine sources where the prompt has two. The invented label reaches the text, and
/// the check behind the generation refuses it.
#[test]
fn mutation_a_lock_that_does_not_know_the_live_labels_lets_one_be_invented() {
    let folder = tempfile::tempdir().unwrap();
    let services = services(folder.path());
    let hits = hits(&services);
    let nine: Vec<Hit> = hits.iter().cycle().take(9).cloned().collect();
    let sampling = preferring(&services, &[("[", 50.0), ("9", 100.0)]);
    let generator = EngineGenerate::new(&services.engine, sampling, 40);
    let reply = generator.generate(&frame(&nine), 1).unwrap();
    assert!(reply.text.starts_with("[S9]"), "{}", reply.text);
    let gate = DeltaSGate::NotCalibrated.read(evidence_ds(&hits));
    let outcome = conclude(&frame(&hits), &hits, gate, reply, &AskPolicy::default());
    let refusal = outcome.refusal.unwrap();
    assert!(matches!(refusal, RefusalReason::UnknownCitation { .. }), "{refusal:?}");
}

fn item(hit: &Hit) -> RetrievedItem {
    let (chunk, cosine) = (&hit.chunk, f64::from(hit.cosine));
    RetrievedItem {
        snippet_id: chunk.snippet_id.clone(),
        section_id: chunk.section_id.clone(),
        doc_id: chunk.doc_id.clone(),
        rev: chunk.rev.clone(),
        span: chunk.range().into(),
        tokens: chunk.tokens,
        text_sha256: chunk.text_sha256.clone(),
        score_raw: f64::from(hit.score_raw),
        score_norm: f64::from(hit.score_norm),
        cosine,
        ds_raw: 1.0 - cosine,
        ds_cal: None,
        probe: "ds_qr",
        source: "hybrid",
        k_pos: hit.k_pos,
        selected: false,
    }
}

/// Writes a search record that was changed, in a mode.
fn write(
    server: &Server,
    mode: TraceMode,
    change: impl FnOnce(&mut RetrievedItem, &mut Pins),
) -> Result<(), TraceError> {
    let services = server.state.services().unwrap();
    let collection = services.collections["cabinets"].index().collection();
    let mut retrieved: Vec<_> = hits(&services).iter().map(item).collect();
    let mut pins = services.collections["cabinets"].pins().unwrap();
    change(&mut retrieved[0], &mut pins);
    // sha256("Where is the key?")[..16], as a client would compute it.
    let q_id = "c15ae8d2c8bcba98".to_owned();
    let query = QueryRecord { q_id, text: QUESTION.into(), lang: "und".into(), tokens: 4 };
    let body = TraceBody::Retrieve { query, collection: "cabinets".into(), retrieved };
    let identity = TraceIdentity { trace_id: "trace-1".into(), ..TraceIdentity::default() };
    let log = TraceLog::open(&server.folder.path().join("trace.jsonl")).unwrap().checked(mode);
    log.append_grounded(&identity, &pins, body, collection)
}

/// G-14: `index_hash` is the live one, `rev` the stored one, and so is everything else of a snippet.
#[tokio::test]
async fn a_record_that_is_not_of_the_live_index_is_refused_by_its_rule() {
    let server = warm(&[], None);
    tokio::task::spawn_blocking(move || {
        type Change = fn(&mut RetrievedItem, &mut Pins);
        let cases: [(Change, Rule); 5] = [
            (|_, pins| pins.index_hash = Some("0".repeat(64)), Rule::IndexHash),
            (|item, _| item.rev = "another".into(), Rule::SnippetId),
            (|item, _| item.tokens += 1, Rule::Stored),
            (|item, _| item.section_id = "another".into(), Rule::Stored),
            (|item, _| item.text_sha256 = "0".repeat(64), Rule::Stored),
        ];
        for (change, rule) in cases {
            match write(&server, TraceMode::Enforce, change) {
                Err(TraceError::Contract(breach)) => assert_eq!(breach.rule, rule, "{breach}"),
                other => panic!("{rule}: {other:?}"),
            }
            assert!(write(&server, TraceMode::Off, change).is_ok(), "{rule}: the mutation");
        }
        assert!(write(&server, TraceMode::Enforce, |_, _| {}).is_ok());
    })
    .await
    .unwrap();
}
