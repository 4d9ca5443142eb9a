//! What the clients ask: a mix of everything that a server is asked, drawn from one seed.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{
    held::Held,
    random::Random,
    server::{N_TENANTS, Server},
};

/// Words of the prompts; what they say does not matter, that prompts differ does.
const WORDS: [&str; 16] = [
    "river", "seven", "engine", "because", "paper", "under", "green", "clock", "ask", "window",
    "often", "north", "letter", "quiet", "number", "again",
];
/// Beginnings that prompts share.
const N_PREFIXES: u64 = 2;
/// Prompts in 100 that begin with one of them.
const SHARED_PERCENT: u64 = 60;
/// Requests in 100, of those that can be, whose answers are held to a schema.
const HELD_PERCENT: u64 = 25;
/// Tokens that a template may take to tell of a tool.
const TOOL_TOKENS: usize = 512;
/// Longest prompt plus answer in tokens, whatever the context has room for.
const LONGEST: usize = 1024;
/// Context below which templates and system messages, which are always kept, leave no room.
const SHORTEST_CHAT: usize = 512;
/// Longest answer of one choice in tokens.
const LONGEST_ANSWER: usize = 96;
/// Positions of a page.
const PAGE_TOKENS: usize = 256;
/// Alternatives that a compared answer tells of each token: the most that there are.
pub(super) const TOP: usize = 20;

/// When a client hangs up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// Never.
    ToTheEnd,
    /// After so long without the head of an answer: in the queue, or while the prompt is read.
    Before(Duration),
    /// After so many pieces of a stream.
    Pieces(u64),
}

/// One request.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) path: &'static str,
    pub(super) body: Value,
    pub(super) tenant: usize,
    /// Most tokens of all choices together.
    pub(super) most_tokens: u64,
    pub(super) is_stream: bool,
    pub(super) patience: Patience,
    /// Whether its distributions are compared with those of a fresh prefill.
    pub(super) is_compared: bool,
    /// What its answer is held to.
    pub(super) held: Option<Held>,
}

/// What requests are drawn from.
#[derive(Clone, Debug)]
pub(super) struct Mix {
    /// The name that the server gives its generator.
    pub(super) model: String,
    /// Token ids of the words.
    ids: Vec<u32>,
    has_chat: bool,
    /// Whether chats have room for tools.
    has_tools: bool,
    /// Tokens of the longest prompt plus answer.
    longest: usize,
    /// Requests in 100 that are given up midway.
    pub(super) cancel_percent: u64,
    /// Requests in 100 that are compared.
    pub(super) compare_percent: u64,
}

impl Mix {
    /// Learns from a server what it can be asked.
    ///
    /// # Errors
    /// It does not say.
    pub(super) fn of(server: &Server, cancel_percent: u64) -> Result<Self> {
        let models = server.json("/v1/models", None)?;
        let card = &models["data"][0];
        let model = card["id"].as_str().context("/v1/models: expected a name, found none")?;
        let context = card["exrail"]["context"].as_u64();
        let context = context.context("/v1/models: expected a context, found none")?;
        let asked = json!({"text": WORDS.join(" ")});
        let tokenized = server.json("/v1/tokenize", Some(&asked))?;
        let hello = json!({"model": model, "max_tokens": 1,
                           "messages": [{"role": "user", "content": "hello"}]});
        let pool = usize::try_from(server.gauges()?.pages_total)? * PAGE_TOKENS;
        // No request may fill the pool alone.
        let longest = LONGEST.min(usize::try_from(context)?).min(pool / 4);
        let has_chat =
            longest >= SHORTEST_CHAT && server.json("/v1/chat/completions", Some(&hello)).is_ok();
        Ok(Self {
            model: model.to_owned(),
            ids: serde_json::from_value(tokenized["tokens"].clone())?,
            has_chat,
            has_tools: has_chat && usize::try_from(context)? >= longest + TOOL_TOKENS,
            longest,
            cancel_percent,
            compare_percent: 5,
        })
    }

    /// A prompt that every model has room for.
    pub(super) fn noise_prompt(&self) -> &[u32] {
        &self.ids
    }

    /// Draws a request.
    pub(super) fn draw(&self, random: &mut Random) -> Plan {
        let is_compared = random.chance(self.compare_percent);
        let is_chat = self.has_chat && !is_compared && random.chance(50);
        let most = 1 + below(random, LONGEST_ANSWER.min(self.longest / 4));
        let n_choices = if !is_compared && random.chance(5) { 2 } else { 1 };
        let (path, mut body) = if is_chat {
            ("/v1/chat/completions", self.chat(random))
        } else {
            ("/v1/completions", self.completion(random, most))
        };
        let is_stream = !is_compared && random.chance(50);
        let patience = match (!is_compared && random.chance(self.cancel_percent), is_stream) {
            (false, _) => Patience::ToTheEnd,
            (true, true) if random.chance(60) => Patience::Pieces(1 + random.below(20)),
            (true, _) => Patience::Before(Duration::from_millis(random.below(2000))),
        };
        body["model"] = json!(self.model);
        // A rotation has its own length.
        let most = body["max_tokens"].as_u64().unwrap_or(most as u64);
        body["max_tokens"] = json!(most);
        body["n"] = json!(n_choices);
        body["stream"] = json!(is_stream);
        let may_be_held = !is_compared && body.get("rotation").is_none();
        let held = (may_be_held && random.chance(HELD_PERCENT))
            .then(|| Held::draw(random, is_chat && self.has_tools));
        if let Some(held) = held {
            held.ask(&mut body);
        }
        body["priority"] = json!(["high", "normal", "normal", "low"][below(random, 4)]);
        sampled(random, &mut body);
        if is_compared {
            body["logprobs"] = json!(TOP);
            body["return_token_ids"] = json!(true);
        }
        let tenant = below(random, N_TENANTS);
        let most_tokens = most * n_choices;
        Plan { path, body, tenant, most_tokens, is_stream, patience, is_compared, held }
    }

    fn chat(&self, random: &mut Random) -> Value {
        // A word may be many tokens, and the template takes some.
        let per_word = self.ids.len().div_ceil(WORDS.len());
        let n_words = self.prompt_length(random).saturating_sub(64) / per_word;
        let text = |random: &mut Random, n: usize| {
            (0..n).map(|_| WORDS[below(random, WORDS.len())]).collect::<Vec<_>>().join(" ")
        };
        if random.chance(SHARED_PERCENT) {
            let shared = &mut Random::new(random.below(N_PREFIXES));
            let system = text(shared, self.longest * 5 / 8 / per_word);
            let n_words = 1 + below(random, n_words / 4 + 1);
            let question = text(random, n_words);
            return json!({"messages": [{"role": "system", "content": system},
                                       {"role": "user", "content": question}]});
        }
        let nonce = random.next();
        let question = format!("{nonce:016x} {}", text(random, n_words));
        json!({"messages": [{"role": "user", "content": question}]})
    }

    /// Ids, so that the length is known, which a rotation needs.
    fn completion(&self, random: &mut Random, most: usize) -> Value {
        let mut prompt = Vec::new();
        if random.chance(SHARED_PERCENT) {
            let shared = &mut Random::new(random.below(N_PREFIXES));
            prompt = self.some(shared, self.longest * 5 / 8);
            let n_more = 1 + below(random, 32);
            prompt.extend(self.some(random, n_more));
        } else {
            let n = self.prompt_length(random);
            prompt.extend(self.some(random, n));
        }
        let rotates = random.chance(15);
        let n = prompt.len();
        let mut body = json!({"prompt": prompt});
        if rotates {
            let rotate_at = n + 4 + below(random, 24);
            body["rotation"] = if random.chance(80) {
                json!({"policy": "reprefill", "rotate_at": rotate_at, "window": rotate_at / 2})
            } else {
                json!({"policy": "stop", "rotate_at": rotate_at})
            };
            body["max_tokens"] = json!(rotate_at - n + most);
        }
        body
    }

    /// Tokens of a prompt: short ones are many, and there are long ones.
    fn prompt_length(&self, random: &mut Random) -> usize {
        let most = (self.longest * 2 / 3) >> random.below(5);
        1 + below(random, most)
    }

    fn some(&self, random: &mut Random, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.ids[below(random, self.ids.len())]).collect()
    }
}

/// Greedy, or drawn with a seed of its own.
fn sampled(random: &mut Random, body: &mut Value) {
    body["seed"] = json!(random.next() >> 1);
    body["temperature"] = json!(if random.chance(50) { 0.0 } else { 1.0 });
    if random.chance(25) {
        body["top_p"] = json!(0.9);
    }
}

fn below(random: &mut Random, bound: usize) -> usize {
    usize::try_from(random.below(bound.max(1) as u64)).expect("below a usize")
}

#[cfg(test)]
pub(super) fn mix_for_tests() -> Mix {
    Mix {
        model: "m".into(),
        ids: (3..40).collect(),
        has_chat: true,
        has_tools: true,
        longest: 1024,
        cancel_percent: 30,
        compare_percent: 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plans(n: usize) -> Vec<Plan> {
        let (mix, mut random) = (mix_for_tests(), Random::new(3));
        (0..n).map(|_| mix.draw(&mut random)).collect()
    }

    /// One seed, one soak; and everything that is promised is in it.
    #[test]
    fn the_mix_is_whole_and_the_same_each_time() {
        let (drawn, again) = (plans(2000), plans(2000));
        assert!(drawn.iter().zip(&again).all(|(a, b)| a.body == b.body));
        let share = |is: &dyn Fn(&Plan) -> bool| drawn.iter().filter(|plan| is(plan)).count();
        for (name, n) in [
            ("streams", share(&|plan| plan.is_stream)),
            ("chats", share(&|plan| plan.path.contains("chat"))),
            ("rotations", share(&|plan| plan.body["rotation"]["policy"] == "reprefill")),
            ("stops", share(&|plan| plan.body["rotation"]["policy"] == "stop")),
            ("compared", share(&|plan| plan.is_compared)),
            (
                "compared and rotated",
                share(&|plan| plan.is_compared && plan.body.get("rotation").is_some()),
            ),
            ("held to a value", share(&|plan| matches!(plan.held, Some(Held::Value(_))))),
            ("held to calls", share(&|plan| matches!(plan.held, Some(Held::Calls(_))))),
            ("two choices", share(&|plan| plan.body["n"] == 2)),
            ("greedy", share(&|plan| plan.body["temperature"] == 0.0)),
            ("low", share(&|plan| plan.body["priority"] == "low")),
            ("tenant 2", share(&|plan| plan.tenant == 2)),
            ("in the queue", share(&|plan| matches!(plan.patience, Patience::Before(_)))),
            ("in the answer", share(&|plan| matches!(plan.patience, Patience::Pieces(_)))),
        ] {
            assert!(n > 10 && n < 1900, "{name}: {n}");
        }
        let never_both = |plan: &Plan| plan.is_compared && plan.is_stream;
        assert_eq!(share(&never_both), 0);
    }

    #[test]
    fn prompts_share_beginnings_and_fit() {
        let plans = plans(500);
        let prompts: Vec<Vec<Value>> =
            plans.iter().filter_map(|plan| plan.body["prompt"].as_array().cloned()).collect();
        let begins =
            |a: &[Value], b: &[Value]| a.len() > 512 && b.len() > 512 && a[..512] == b[..512];
        let with_twin =
            prompts.iter().filter(|a| prompts.iter().filter(|b| begins(a, b)).count() > 1);
        assert!(with_twin.count() > 20);
        assert!(prompts.iter().all(|prompt| prompt.len() + LONGEST_ANSWER <= 1024));
    }
}
