//! Evaluation of the built-in model on small tables in the layouts of the hub.

mod damage;
mod data;
mod rules;
mod runs;
mod shards;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use burn_flex::Flex;
use reroute_eval::{
    Data, EvalError, Event, GroundingPrompt, OnError, Records, Settings, Shard, Task, run,
};
use reroute_zoo::{OpenOptions, Vlm, embedded};
use tempfile::TempDir;

static VLM: LazyLock<Vlm<Flex>> = LazyLock::new(|| {
    let (folder, options) = (embedded::checkpoint(), OpenOptions::default());
    Vlm::open(&folder, &options, &Default::default()).expect("the built-in model")
});

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn open(task: Task, name: &str) -> Data {
    Data::open(task, task.default_split(), &fixture(name)).expect("the fixture")
}

fn settings(routings: &[&str]) -> Settings {
    let named = |name: &&str| (name.to_string(), VLM.plan(name).expect("a preset"));
    Settings {
        routings: routings.iter().map(named).collect(),
        limit: None,
        shard: Shard::default(),
        prompt: GroundingPrompt::Family,
        max_new_tokens: Some(8),
        batch: 4,
        on_error: OnError::Stop,
        resume: false,
        model: "built-in".into(),
    }
}

fn measure(data: &Data, settings: &Settings, folder: &Path) -> Result<Vec<Records>, EvalError> {
    run(&VLM, data, settings, folder, &mut |_| {
        ControlFlow::Continue(())
    })
}

/// The same, killed behind so many records.
fn killed(data: &Data, settings: &Settings, folder: &Path, records: usize) {
    let mut written = 0;
    let result = run(&VLM, data, settings, folder, &mut |event| {
        written += usize::from(matches!(event, Event::Wrote { .. }));
        match written < records {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        }
    });
    assert!(
        matches!(result, Err(EvalError::Stopped { .. })),
        "{result:?}"
    );
}
