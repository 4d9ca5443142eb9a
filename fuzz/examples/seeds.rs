//! Writes valid inputs to `corpus/<target>/`, from which the fuzzer starts.

use std::fs;
use std::io;
use std::path::Path;

use exrail_testkit::{TinyLlama, safetensors_bytes, tiny_bert, tiny_llama};

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in ["gguf", "safetensors", "bert_config", "document"] {
        fs::create_dir_all(corpus.join(target))?;
    }

    let small =
        TinyLlama { n_layers: 1, width: 4, n_heads: 2, ffn_width: 4, ..TinyLlama::default() };
    for (name, tied) in [("tied", true), ("untied", false)] {
        fs::write(corpus.join("gguf").join(name), tiny_llama(1, TinyLlama { tied, ..small }))?;
    }

    let tensors =
        [("a".to_owned(), vec![2, 2], vec![0.5; 4]), ("b".to_owned(), vec![1], vec![1.0])];
    fs::write(corpus.join("safetensors/two"), safetensors_bytes(&tensors))?;

    // The first byte picks the format, see the target.
    let markdown = "\x78---\na: b\n---\n# One\n\nText. More e.g. this.\n- a\n  b\n\n\
                    | h | i |\n|---|---|\n| 1 | 2 |\n\n```\ncode\n```\n<!-- x -->\nSub\n---\n$$\nx\n$$\n";
    fs::write(corpus.join("document/markdown"), markdown)?;
    fs::write(corpus.join("document/text"), "\x79One. Two!\n\nThree\x0cFour\n")?;
    let html = "\x7a<title>t</title><h1 id=a>One</h1><p>Text&shy;.<nav>n</nav><ul><li>a</ul>\
                <table><tr><td>1<td>2</table><pre>c\n d</pre>";
    fs::write(corpus.join("document/html"), html)?;

    let dir = corpus.join("bert_config/folder");
    tiny_bert(1, &dir)?;
    let names =
        ["config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"];
    let files = names.map(|name| fs::read(dir.join(name)));
    fs::remove_dir_all(&dir)?;
    let files = files.into_iter().collect::<io::Result<Vec<_>>>()?;
    fs::write(corpus.join("bert_config/tiny"), files.join(&0))
}
