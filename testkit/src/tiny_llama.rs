//! [`tiny_llama`]: a complete decoder with tokenizer and chat template in one small GGUF.

use exrail_tensor::{DType, quantize};

use crate::{GgufValue, GgufWriter, Random};

/// `ChatML`, as the `SmolLM2` and Qwen families use it, without a default system message.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Control tokens, with the first ids.
const SPECIALS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Merges in rank order, in byte-level spelling (`Ġ` is a space). Each makes one token.
const MERGES: [&str; 45] = [
    "Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "e r", "Ġt he", "Ġ s", "a t", "e n", "o r", "Ġ w",
    "i s", "Ġ c", "a n", "i t", "o u", "l l", "e s", "Ġ o", "Ġ b", "Ġ f", "Ġ p", "in g", "Ġ i",
    "Ġ m", "s t", "e d", "Ġo f", "Ġt o", "Ġi n", "Ġi s", "l e", "a r", "o l", "n o", "t e", "x t",
    "no t", "Ġ d", "q u", "u s", "an d", "Ġa n",
];

/// Sizes and format of a tiny decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TinyLlama {
    /// Decoder layers.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Query heads; a divisor of `width`.
    pub n_heads: usize,
    /// Key and value heads; a divisor of `n_heads`.
    pub n_kv_heads: usize,
    /// Width of the feed-forward network.
    pub ffn_width: usize,
    /// Positions claimed in the metadata.
    pub context_len: usize,
    /// Format of every matrix; norms are `F32`.
    pub dtype: DType,
    /// Whether the embedding table is the output head.
    pub tied: bool,
}

impl Default for TinyLlama {
    fn default() -> TinyLlama {
        TinyLlama {
            n_layers: 2,
            width: 64,
            n_heads: 4,
            n_kv_heads: 2,
            ffn_width: 128,
            context_len: 2048,
            dtype: DType::F32,
            tied: true,
        }
    }
}

impl TinyLlama {
    /// The default sizes in `dtype`; widths grow to 256 where a format's blocks need that.
    #[must_use]
    pub fn with_dtype(dtype: DType) -> TinyLlama {
        let default = TinyLlama::default();
        let width = default.width.next_multiple_of(dtype.block_len());
        let ffn_width = default.ffn_width.next_multiple_of(dtype.block_len());
        TinyLlama { width, ffn_width, dtype, ..default }
    }
}

/// A GGUF of architecture `llama` with seeded Gaussian weights of variance 1 / columns, a
/// byte-level BPE tokenizer of 256 bytes, some merges and three control tokens, and [`ChatML`]
/// as its template. The weights of a tensor depend on `seed` and its name only.
///
/// [`ChatML`]: CHAT_TEMPLATE
///
/// # Panics
/// When a width is not a whole number of `spec.dtype`'s blocks or heads do not divide evenly.
#[must_use]
pub fn tiny_llama(seed: u64, spec: TinyLlama) -> Vec<u8> {
    assert!(spec.width.is_multiple_of(spec.n_heads), "{spec:?}: heads must divide the width");
    let head_dim = spec.width / spec.n_heads;
    let kv_width = spec.n_kv_heads * head_dim;
    let tokens = tokens();
    let mut writer = add_tokenizer(with_sizes(spec, head_dim, tokens.len()), &tokens);
    let matrices = Matrices { seed, dtype: spec.dtype };
    writer = matrices.add(writer, "token_embd.weight", tokens.len(), spec.width);
    for i in 0..spec.n_layers {
        writer = add_norm(writer, seed, &format!("blk.{i}.attn_norm.weight"), spec.width);
        for (name, rows, columns) in [
            ("attn_q", spec.width, spec.width),
            ("attn_k", kv_width, spec.width),
            ("attn_v", kv_width, spec.width),
            ("attn_output", spec.width, spec.width),
            ("ffn_gate", spec.ffn_width, spec.width),
            ("ffn_up", spec.ffn_width, spec.width),
            ("ffn_down", spec.width, spec.ffn_width),
        ] {
            writer = matrices.add(writer, &format!("blk.{i}.{name}.weight"), rows, columns);
        }
        writer = add_norm(writer, seed, &format!("blk.{i}.ffn_norm.weight"), spec.width);
    }
    writer = add_norm(writer, seed, "output_norm.weight", spec.width);
    if !spec.tied {
        writer = matrices.add(writer, "output.weight", tokens.len(), spec.width);
    }
    writer.finish()
}

fn with_sizes(spec: TinyLlama, head_dim: usize, vocab_size: usize) -> GgufWriter {
    let number = |n: usize| u32::try_from(n).expect("tiny");
    GgufWriter::new()
        .key("general.architecture", "llama")
        .key("general.name", "Tiny Llama")
        .key("llama.block_count", number(spec.n_layers))
        .key("llama.context_length", number(spec.context_len))
        .key("llama.embedding_length", number(spec.width))
        .key("llama.feed_forward_length", number(spec.ffn_width))
        .key("llama.attention.head_count", number(spec.n_heads))
        .key("llama.attention.head_count_kv", number(spec.n_kv_heads))
        .key("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .key("llama.rope.freq_base", 10_000.0)
        .key("llama.rope.dimension_count", number(head_dim))
        .key("llama.vocab_size", number(vocab_size))
}

pub(crate) fn add_tokenizer(writer: GgufWriter, tokens: &[String]) -> GgufWriter {
    let kinds = (0..tokens.len()).map(|id| if id < SPECIALS.len() { 3 } else { 1 }).collect();
    let merges = MERGES.iter().map(|&merge| merge.to_owned()).collect();
    writer
        .key("tokenizer.ggml.model", "gpt2")
        .key("tokenizer.ggml.pre", "smollm")
        .key("tokenizer.ggml.tokens", GgufValue::Texts(tokens.to_vec()))
        .key("tokenizer.ggml.token_type", GgufValue::I32s(kinds))
        .key("tokenizer.ggml.merges", GgufValue::Texts(merges))
        .key("tokenizer.ggml.bos_token_id", 1)
        .key("tokenizer.ggml.eos_token_id", 2)
        .key("tokenizer.ggml.unknown_token_id", 0)
        .key("tokenizer.ggml.padding_token_id", 2)
        .key("tokenizer.ggml.add_bos_token", false)
        .key("tokenizer.ggml.add_space_prefix", false)
        .key("tokenizer.chat_template", CHAT_TEMPLATE)
}

/// Control tokens, then the 256 bytes in byte order, then one token per merge.
fn tokens() -> Vec<String> {
    let specials = SPECIALS.iter().map(|&special| special.to_owned());
    let merged = MERGES.iter().map(|merge| merge.replace(' ', ""));
    specials.chain(byte_spellings().map(String::from)).chain(merged).collect()
}

/// The same, and as many that no text has as make `vocab_size`.
pub(crate) fn filled_tokens(vocab_size: usize) -> Vec<String> {
    let mut all = tokens();
    let unused = (0..).map(|i| format!("<unused{i}>"));
    all.extend(unused.take(vocab_size.saturating_sub(all.len())));
    all
}

/// GPT-2's printable stand-ins for the 256 bytes (`bytes_to_unicode` in its encoder.py).
fn byte_spellings() -> impl Iterator<Item = char> {
    let mut next_stand_in = 256;
    (0..=255_u8).map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => {
            let stand_in = char::from_u32(next_stand_in).expect("a letter of Latin Extended-A");
            next_stand_in += 1;
            stand_in
        }
    })
}

struct Matrices {
    seed: u64,
    dtype: DType,
}

impl Matrices {
    fn add(&self, writer: GgufWriter, name: &str, rows: usize, columns: usize) -> GgufWriter {
        let fits = self.dtype.row_bytes(columns).is_some();
        assert!(fits, "`{name}`: {columns} columns are not whole blocks of {}", self.dtype);
        #[expect(clippy::cast_precision_loss, reason = "widths are far below 2^24")]
        let scale = 1.0 / (columns as f32).sqrt();
        let values = Random::named(self.seed, name).gaussians(rows * columns, scale);
        let data = quantize(self.dtype, &values).expect("rows are whole blocks");
        writer.tensor(name, self.dtype, &[rows, columns], &data)
    }
}

/// A norm's weights around one, so that forgetting them shows.
fn add_norm(writer: GgufWriter, seed: u64, name: &str, width: usize) -> GgufWriter {
    let mut values = Random::named(seed, name).gaussians(width, 0.1);
    values.iter_mut().for_each(|x| *x += 1.0);
    let data = quantize(DType::F32, &values).expect("F32 has blocks of one");
    writer.tensor(name, DType::F32, &[width], &data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_merge_joins_two_earlier_tokens_into_a_new_one() {
        let tokens = tokens();
        for (rank, merge) in MERGES.iter().enumerate() {
            let known = &tokens[..SPECIALS.len() + 256 + rank];
            let (left, right) = merge.split_once(' ').unwrap();
            assert!(known.iter().any(|token| token == left), "{merge}");
            assert!(known.iter().any(|token| token == right), "{merge}");
            assert!(!known.contains(&format!("{left}{right}")), "{merge}");
        }
    }

    #[test]
    fn byte_spellings_are_distinct_and_a_space_is_spelled_as_gpt2_spells_it() {
        let spellings: Vec<char> = byte_spellings().collect();
        let mut distinct = spellings.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 256);
        assert_eq!(spellings[usize::from(b' ')], 'Ġ');
        assert_eq!(spellings[usize::from(b'\n')], 'Ċ');
    }

    #[test]
    fn same_seed_same_bytes_and_another_seed_others() {
        let spec = TinyLlama::with_dtype(DType::Q4_K);
        assert_eq!(tiny_llama(7, spec), tiny_llama(7, spec));
        assert_ne!(tiny_llama(7, spec), tiny_llama(8, spec));
    }
}
