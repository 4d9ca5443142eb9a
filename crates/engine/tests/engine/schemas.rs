//! Schemas of clients, drawn from a seed. Also of the test on the real model.

use exrail_testkit::Random;
use serde_json::{Map, Value, json};

/// Deepest nesting below the object.
const DEPTH: usize = 2;

/// The `n`th schema: an object of one to five members, some of them optional, in which every value is bounded.
pub(crate) fn schema(n: u64) -> Value {
    let mut random = Random::named(n, "schema");
    object(&mut random, DEPTH)
}

fn object(random: &mut Random, depth: usize) -> Value {
    const NAMES: [&str; 8] = ["id", "name", "is_open", "tags", "place", "the_count", "é", "a b"];
    let first = random.below(NAMES.len());
    let mut members = Map::new();
    let mut required = Vec::new();
    for at in 0..=random.below(5) {
        let name = NAMES[(first + at) % NAMES.len()];
        members.insert(name.to_owned(), value(random, depth));
        if random.below(3) > 0 {
            required.push(name);
        }
    }
    json!({"type": "object", "properties": members, "required": required,
        "additionalProperties": false})
}

fn value(random: &mut Random, depth: usize) -> Value {
    let n_kinds = if depth > 0 { 9 } else { 6 };
    match random.below(n_kinds) {
        0 => json!({"type": "integer", "minimum": -9, "maximum": 10 + random.below(990)}),
        1 => json!({"type": "boolean"}),
        2 => json!({"enum": ["red", "green", "dark blue", null, 7]}),
        3 => json!({"const": {"kind": "fixed", "n": [1, 2]}}),
        4 => json!({"type": "string", "maxLength": 1 + random.below(12)}),
        5 => json!({"type": "null"}),
        6 => {
            json!({"type": "array", "items": value(random, depth - 1), "minItems": random.below(2),
            "maxItems": 1 + random.below(3)})
        }
        7 => object(random, depth - 1),
        _ => json!({"anyOf": [value(random, depth - 1), {"type": "boolean"}]}),
    }
}
