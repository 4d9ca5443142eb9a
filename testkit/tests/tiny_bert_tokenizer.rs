//! The tiny BERT's tokenizer.json as the crate `tokenizers` reads it.

use tokenizers::Tokenizer;

#[test]
fn tokenizer_json_loads_and_frames_texts() {
    let dir = tempfile::tempdir().unwrap();
    exrail_testkit::tiny_bert(3, dir.path()).unwrap();
    let tokenizer = Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
    let encoding = tokenizer.encode("The PUMP leaks, naïve 漢!", true).unwrap();
    let tokens = encoding.get_tokens();
    let expected = [
        "[CLS]", "the", "pump", "l", "##e", "##a", "##k", "##s", ",", "n", "##a", "##i", "##v",
        "##e", "[UNK]", "!", "[SEP]",
    ];
    assert_eq!(tokens, expected);
    assert_eq!(encoding.get_ids()[0], 2);
    assert_eq!(encoding.get_offsets()[1], (0, 3));
}
