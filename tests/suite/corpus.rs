//! Every input of the fuzz targets (`fuzz/corpus`), whatever it is, comes to an end without a panic.

#[path = "../../fuzz/src/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

use targets::TARGETS;

#[test]
fn no_input_of_the_corpus_does_harm() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, target) in TARGETS {
        let entries = corpus.join(name).read_dir();
        let entries = entries.unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut inputs = 0;
        for entry in entries {
            let path = entry.expect("an entry").path();
            target(&fs::read(&path).expect("an input"));
            inputs += 1;
        }
        assert!(inputs > 1, "{name}");
    }
}
