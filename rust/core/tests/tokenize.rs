//! Encoding, decoding and streaming with a byte-fallback tokenizer.
#![expect(clippy::expect_used, reason = "a test may fail")]

use prefixfast_core::Error;
use prefixfast_core::tokenize::{Ragged, Tokenizer};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// Tokenizer whose ids 0 to 255 are bytes, 256 to 258 are words, and 259 is a special token.
fn byte_fallback() -> Tokenizer {
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let tokens = bytes.chain(["\u{2581}the", "a", "\u{2581}"].map(str::to_owned));
    let vocab: serde_json::Map<String, serde_json::Value> =
        tokens.zip(0..).map(|(token, id)| (token, id.into())).collect();
    let special = serde_json::json!({
        "id": 259, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true,
    });
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [special], "pre_tokenizer": null,
        "post_processor": null,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true, "unk_token": null},
    });
    Tokenizer::new(&json.to_string()).expect("a tokenizer")
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 512,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(5),
        ..ProptestConfig::default()
    })]

    #[test]
    fn streamed_pieces_join_to_the_decoded_text(
        ids in prop::collection::vec(prop_oneof![128..256_i32, 250..262_i32, Just(0xC3), Just(0xA9)], 0..24),
        size in 1..4_usize, skip: bool,
    ) {
        let tokenizer = byte_fallback();
        let mut stream = tokenizer.stream(skip);
        let mut text: String = ids.chunks(size).map(|chunk| stream.push(chunk).expect("text")).collect();
        text += &stream.finish().expect("text");
        let end = i32::try_from(ids.len()).expect("few");
        prop_assert_eq!(vec![text], tokenizer.decode_batch(&ids, &[0, end], skip).expect("text"));
    }
}

#[test]
fn small_and_large_batches_encode_alike() {
    let tokenizer = byte_fallback();
    let few = tokenizer.encode_batch(&["a", "", "\u{e9}"], false).expect("ids");
    assert_eq!(
        few,
        Ragged {
            ids: vec![257, 0xC3, 0xA9],
            indptr: vec![0, 1, 1, 3]
        }
    );
    let many = tokenizer.encode_batch(&["a"; 100], false).expect("ids");
    assert_eq!(many.ids, [257; 100]);
    assert_eq!(
        tokenizer.decode_batch(&many.ids, &many.indptr, false).expect("texts"),
        ["a"; 100]
    );
}

#[test]
fn invalid_inputs_are_refused() {
    let tokenizer = byte_fallback();
    assert!(matches!(Tokenizer::new("{}"), Err(Error::Config(_))));
    assert!(matches!(
        tokenizer.decode_batch(&[1], &[0, 2], true),
        Err(Error::Config(_))
    ));
    assert!(matches!(
        tokenizer.decode_batch(&[-1], &[0, 1], true),
        Err(Error::Data(_))
    ));
    assert!(matches!(tokenizer.stream(true).push(&[-1]), Err(Error::Data(_))));
}
