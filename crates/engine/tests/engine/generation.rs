//! What comes out: equal under every schedule, filtered, stopped and described as asked.

use crate::support::{
    Answer, Faults, assert_all_pages_return, collect, generate, greedy, healthy, options, plain,
    prompt, start, start_with,
};
use exrail_engine::{
    EngineOptions, Finish, GenerateRequest, Sampling, SubmitError, WarmUpPlan, warm_up,
};

#[test]
fn batch_equals_alone() {
    // On the reference every row is computed by itself, so the bound is zero.
    let engine = start(options());
    let requests: Vec<GenerateRequest> = (0..8).map(|n| greedy(prompt(n, 3 + 9 * n), 24)).collect();
    let alone: Vec<Answer> =
        requests.iter().map(|request| generate(&engine, request.clone())).collect();
    let generations: Vec<_> =
        requests.iter().map(|request| engine.submit(request.clone()).unwrap()).collect();
    for (generation, alone) in generations.iter().zip(&alone) {
        let together = collect(generation);
        assert_eq!(together.ids(), alone.ids());
        assert_eq!(together.text(), alone.text());
    }
    assert_all_pages_return(&engine);
}

/// K1: nobody waits for a batch to end.
#[test]
fn more_sequences_than_places_all_finish_in_order_of_admission() {
    let engine = start(options());
    let generations: Vec<_> =
        (0..20).map(|n| engine.submit(greedy(prompt(n, 40), 16)).unwrap()).collect();
    for generation in &generations {
        let answer = collect(generation);
        assert_eq!(answer.finished().finish, Finish::Length);
        assert_eq!(answer.finished().usage.completion_tokens, 16);
        assert_eq!(answer.finished().usage.prompt_tokens, 40);
    }
    let counters = engine.counters();
    assert_eq!((counters.submitted, counters.finished), (20, 20));
    assert_eq!((counters.tokens_prompt, counters.tokens_generated), (800, 320));
    // Alone, 20 sequences of 2 prompt chunks and 15 decode steps would take 340 steps.
    assert!(counters.steps < 150, "{counters:?}");
    assert_all_pages_return(&engine);
}

#[test]
fn prefill_equals_decode() {
    let ids = prompt(3, 300);
    let rows = |prefill_chunk: usize| {
        start(EngineOptions { prefill_chunk, ..options() }).forward_logits(ids.clone()).unwrap()
    };
    // Row by row is what decode does; whole chunks are prefill. Same rows, same sums: equal bits.
    let decode = rows(1);
    assert_eq!(decode.len(), 300);
    for chunk in [7, 256] {
        assert!(rows(chunk) == decode, "chunk {chunk}");
    }
    let engine = start(options());
    let answer = generate(&engine, greedy(ids[..40].to_vec(), 20));
    let mut all = ids[..40].to_vec();
    all.extend(answer.ids());
    let logits = engine.forward_logits(all).unwrap();
    for (step, id) in answer.ids().into_iter().enumerate() {
        let mut row = logits[39 + step].clone();
        for (banned, bias) in healthy() {
            row[banned as usize] += bias;
        }
        let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        assert_eq!(best, id as usize, "step {step}");
    }
    assert_all_pages_return(&engine);
}

#[test]
fn seeded_sampling_ignores_co_batched_traffic() {
    let engine = start(options());
    let seeded = |sequence| {
        let mut request = greedy(prompt(1, 20), 32);
        request.sampling =
            Sampling { seed: 42, sequence, logit_bias: healthy(), ..Sampling::default() };
        request
    };
    let alone = generate(&engine, seeded(0));
    let traffic: Vec<_> =
        (0..5).map(|n| engine.submit(greedy(prompt(n + 50, 90), 60)).unwrap()).collect();
    let busy = generate(&engine, seeded(0));
    assert_eq!(alone.ids(), busy.ids());
    assert_ne!(alone.ids(), generate(&engine, seeded(1)).ids());
    drop(traffic);
    assert_all_pages_return(&engine);
}

/// Seven requests with different options, some of which need the logits of their steps.
fn sampled() -> Vec<GenerateRequest> {
    let request = |n: u32, sampling: Sampling| {
        let mut request = greedy(prompt(n, 9 + 5 * n), 30 - n as usize);
        request.sampling = Sampling { seed: u64::from(n), ..sampling };
        request
    };
    let base = Sampling::default();
    vec![
        request(0, base.clone()),
        request(1, Sampling { temperature: 0.7, top_p: 0.9, ..base.clone() }),
        request(2, Sampling { temperature: 3.0, top_k: Some(40), ..base.clone() }),
        request(3, Sampling { min_p: 0.2, sequence: 4, ..base.clone() }),
        request(4, Sampling::greedy()),
        request(5, Sampling { presence_penalty: 0.5, ..base.clone() }),
        request(6, Sampling { logit_bias: healthy(), ..base }),
    ]
}

/// The same seed gives the same tokens, drawn by the host or on a device that runs ahead, alone or in a
/// batch whose first steps hold sequences that need the logits.
#[test]
fn the_device_draws_what_the_host_draws() {
    let [host, ahead] = [false, true].map(|ahead| start_with(Faults::default(), ahead, options()));
    let expected: Vec<_> = sampled().into_iter().map(|r| generate(&host, r).ids()).collect();
    let greedy = generate(&host, plain(prompt(0, 9), 30)).ids();
    assert_ne!(expected[0], greedy);
    for engine in [&host, &ahead] {
        let alone: Vec<_> = sampled().into_iter().map(|r| generate(engine, r).ids()).collect();
        assert_eq!(alone, expected);
        for n_kept in [sampled().len(), 5] {
            let requests = sampled().into_iter().take(n_kept);
            let all: Vec<_> = requests.map(|request| engine.submit(request).unwrap()).collect();
            let together: Vec<_> = all.iter().map(|one| collect(one).ids()).collect();
            assert_eq!(together, expected[..n_kept]);
        }
        assert_all_pages_return(engine);
    }
}

/// I3 of the field faults.
#[test]
fn i3_a_stop_string_over_several_tokens_never_leaks() {
    let engine = start(options());
    let whole = generate(&engine, greedy(prompt(2, 10), 48)).text();
    let characters: Vec<(usize, char)> = whole.char_indices().collect();
    let cut = characters[characters.len() / 2].0;
    let end = characters[characters.len() / 2 + 5].0;
    let stop = whole[cut..end].to_owned();
    let expected = whole[..whole.find(&stop).unwrap()].to_owned();
    let mut request = greedy(prompt(2, 10), 48);
    request.stop = vec!["never in the text".to_owned(), stop.clone()];
    let answer = generate(&engine, request);
    assert_eq!(answer.text(), expected);
    assert_eq!(answer.finished().finish, Finish::Stop);
    assert_eq!(answer.finished().stop_string, Some(stop));
}

#[test]
fn i1_i6_text_is_the_repaired_bytes_of_all_tokens_and_log_probabilities_carry_them() {
    let engine = start(options());
    for n in 0..6 {
        let mut request = greedy(prompt(n, 8), 64);
        request.sampling = Sampling { temperature: 3.0, seed: u64::from(n), ..Sampling::default() };
        request.sampling.logit_bias = healthy();
        request.logprobs = Some(0);
        let answer = generate(&engine, request);
        let bytes: Vec<u8> = answer
            .tokens
            .iter()
            .flat_map(|token| token.logprob.as_ref().unwrap().bytes.clone())
            .collect();
        assert_eq!(answer.text(), String::from_utf8_lossy(&bytes));
    }
}

/// The most likely token alone, or found among all logits: alone, and beside a sequence that needs
/// them.
#[test]
fn a_greedy_answer_is_the_same_whatever_is_measured_beside_it() {
    let engine = start(options());
    for seed in 0..6 {
        let plain = greedy(prompt(seed, 9), 12);
        let measured = GenerateRequest { entropy: true, ..plain.clone() };
        let expected = generate(&engine, measured.clone());
        assert!(expected.tokens.iter().all(|token| token.entropy.is_some()));
        assert!(expected.finished().entropy_mean.is_some());
        let found = generate(&engine, plain.clone());
        assert!(found.tokens.iter().all(|token| token.entropy.is_none()));
        assert_eq!((found.ids(), found.finished().entropy_mean), (expected.ids(), None));
        let beside = engine.submit(measured).unwrap();
        assert_eq!(generate(&engine, plain).ids(), expected.ids());
        drop(beside);
    }
}

#[test]
fn log_probabilities_and_entropy_are_those_of_the_raw_logits() {
    let engine = start(options());
    let mut request = greedy(prompt(4, 12), 8);
    request.logprobs = Some(20);
    request.entropy = true;
    request.sampling.repetition_penalty = 1.3; // must not show in the log-probabilities
    let answer = generate(&engine, request);
    let mut ids = prompt(4, 12);
    ids.extend(answer.ids());
    let rows = engine.forward_logits(ids).unwrap();
    for (step, token) in answer.tokens.iter().enumerate() {
        let row: Vec<f64> = rows[11 + step].iter().map(|&x| f64::from(x)).collect();
        let log_sum = row.iter().map(|x| x.exp()).sum::<f64>().ln();
        let logprob = token.logprob.as_ref().unwrap();
        let exact = row[token.id as usize] - log_sum;
        assert!((f64::from(logprob.logprob) - exact).abs() < 1e-5);
        let entropy: f64 = row.iter().map(|x| -(x - log_sum).exp() * (x - log_sum)).sum();
        assert!((f64::from(token.entropy.unwrap()) - entropy).abs() < 1e-4);
        assert_eq!(logprob.top.len(), 20);
        assert!(logprob.top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob));
        for alternative in &logprob.top {
            let exact = row[alternative.id as usize] - log_sum;
            assert!((f64::from(alternative.logprob) - exact).abs() < 1e-5);
        }
    }
    let total: f64 = {
        let row = &rows[11];
        let log_sum = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        row.iter().map(|&x| (f64::from(x) - log_sum).exp()).sum()
    };
    assert!((total - 1.0).abs() < 1e-9);
}

#[test]
fn e10_each_end_of_sequence_ends_an_answer_and_is_not_part_of_it() {
    let engine = start(options());
    let eos = engine.tokenizer().eos_ids().to_vec();
    assert!(eos.len() >= 2, "tiny models have <|endoftext|> and <|im_end|>");
    for id in eos {
        let mut request = greedy(prompt(5, 6), 10);
        request.sampling.logit_bias = vec![(id, 100.0)];
        request.stop_at_eos = true;
        let answer = generate(&engine, request.clone());
        assert_eq!(answer.finished().finish, Finish::Stop);
        assert_eq!(answer.ids(), Vec::<u32>::new());
        request.stop_at_eos = false;
        let answer = generate(&engine, request);
        assert_eq!(answer.ids(), vec![id; 10]);
        assert_eq!(answer.text(), "", "control tokens show nothing");
    }
}

#[test]
fn lengths_are_refused_with_both_numbers() {
    let engine = start(EngineOptions { max_context: Some(64), ..options() });
    assert_eq!(engine.facts().context, 64);
    let refused = |len, max_tokens| engine.submit(greedy(prompt(0, len), max_tokens)).unwrap_err();
    assert_eq!(refused(64, 1), SubmitError::PromptTooLong { tokens: 64, limit: 63 });
    let expected = SubmitError::TooManyTokens { prompt_tokens: 60, max_tokens: 5, limit: 4 };
    assert_eq!(refused(60, 5), expected);
    assert_eq!(engine.max_new_tokens(60), 4);
    assert_eq!(engine.submit(greedy(vec![], 5)).unwrap_err(), SubmitError::EmptyPrompt);
    let answer = generate(&engine, greedy(prompt(0, 63), 1));
    assert_eq!(answer.finished().finish, Finish::Length);
    let answer = generate(&engine, greedy(prompt(0, 60), 4));
    assert_eq!(answer.tokens.len(), 4);
}

#[test]
fn start_refuses_options_that_cannot_be_honoured() {
    use exrail_engine::{Engine, EngineError};
    use exrail_kernels::reference::Reference;
    let field = |options| match Engine::start(crate::support::load(Reference), options) {
        Err(EngineError::BadOption { field, .. }) => field,
        other => panic!("expected a refused option, found {other:?}"),
    };
    assert_eq!(field(EngineOptions { max_sequences: 0, ..options() }), "max_sequences");
    assert_eq!(field(EngineOptions { prefill_chunk: 0, ..options() }), "prefill_chunk");
    assert_eq!(field(EngineOptions { queue_limit: 0, ..options() }), "queue_limit");
    assert_eq!(field(EngineOptions { kv_pages: Some(0), ..options() }), "kv_pages");
    assert_eq!(field(EngineOptions { max_context: Some(4096), ..options() }), "max_context");
    let both = EngineOptions { kv_pages: Some(1), max_context: Some(300), ..options() };
    assert_eq!(field(both), "kv_pages");
}

#[test]
fn warm_up_measures_and_leaves_no_trace() {
    // No injected faults here: the plan's prompts use the whole vocabulary.
    let loaded = crate::support::load(exrail_kernels::reference::Reference);
    let engine = exrail_engine::Engine::start(loaded, options()).unwrap();
    let plan = WarmUpPlan::full(&engine);
    let report = warm_up(&engine, &plan).unwrap();
    // Decode buckets 1, 2, 4, 8 and prefill buckets 1, 32 (the chunk), 64, 512.
    assert_eq!(report.buckets.len(), 8);
    let shapes = 2 * 10 * (plan.crowd.len() + plan.shapes.iter().map(Vec::len).sum::<usize>());
    // Behind the fence each bucket runs once more, to its first token.
    assert_eq!(report.n_tokens, (3 * 10 + 1) * (1 + 2 + 4 + 8 + 4) + shapes);
    assert!(report.is_stable);
    assert!(report.cold_ratio > 0.0);
    let ready = report.buckets.iter().map(|bucket| bucket.ready_ratio);
    assert_eq!(ready.fold(0.0, f64::max), report.ready_ratio);
    assert!(report.buckets.iter().all(|bucket| bucket.ready_ratio > 0.0), "{report:?}");
    let counters = engine.counters();
    assert_eq!(counters.pages_free, counters.pages_total);
    let totals = [
        counters.steps,
        counters.tokens_prompt,
        counters.tokens_generated,
        counters.submitted,
        counters.finished,
        counters.cancelled,
        counters.failed,
    ];
    assert_eq!(totals, [0; 7]);
}

/// J3 of the field faults: padding of the output matrix gets no probability.
#[test]
fn e11_j3_rows_beyond_the_tokenizer_are_never_sampled() {
    use std::sync::Arc;

    use exrail_checkpoint::VocabularyTable;
    use exrail_engine::Engine;
    use exrail_kernels::reference::Reference;
    use exrail_text::{Tokenizer, Vocabulary};
    // The model keeps its rows, the tokenizer forgets the last token and the merge that makes it.
    let table = VocabularyTable::from_gguf(&crate::support::gguf()).unwrap();
    let vocab_len = table.tokens.len() - 1;
    let tokenizer = Tokenizer::from_vocabulary(Vocabulary {
        model: table.model,
        pre: table.pre,
        tokens: table.tokens[..vocab_len].to_vec(),
        kinds: table.kinds[..vocab_len].to_vec(),
        merges: table.merges[..table.merges.len() - 1].to_vec(),
        eos: table.eos,
        bos: table.bos,
        ..Vocabulary::default()
    });
    let mut loaded = crate::support::load(Reference);
    loaded.tokenizer = Arc::new(tokenizer.unwrap());
    let engine = Engine::start(loaded, options()).unwrap();
    assert_eq!(engine.facts().vocab_len, vocab_len);
    for seed in 0..4 {
        let mut request = GenerateRequest::new(prompt(0, 4), 500);
        request.sampling = Sampling { temperature: 5.0, seed, ..Sampling::default() };
        request.stop_at_eos = false;
        request.logprobs = Some(20);
        let answer = generate(&engine, request);
        assert_eq!(answer.tokens.len(), 500);
        assert!(answer.ids().iter().all(|&id| (id as usize) < vocab_len));
        let alternatives = answer.tokens.iter().flat_map(|t| &t.logprob.as_ref().unwrap().top);
        assert!(alternatives.map(|a| a.id as usize).all(|id| id < vocab_len));
    }
    let beyond = u32::try_from(vocab_len).unwrap();
    let refused = engine.submit(greedy(vec![beyond], 1)).unwrap_err();
    assert_eq!(refused, SubmitError::UnknownToken { id: beyond, vocab_len });
}
