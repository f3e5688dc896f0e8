//! Teaches the built-in model, which knows "find the large cyan square", other words for it: a few steps on a
//! low-rank adapter, through a routed forward pass. The adapter is saved as PEFT does and loaded again.

use std::error::Error;

use reroute_zoo::backend::Flex;
use reroute_zoo::burn::backend::Autodiff;
use reroute_zoo::burn::optim::{AdamWConfig, GradientsParams, Optimizer};
use reroute_zoo::burn::tensor::activation::log_softmax;
use reroute_zoo::burn::tensor::backend::Backend;
use reroute_zoo::burn::tensor::{Int, Tensor};
use reroute_zoo::{
    AdapterConfig, DecodeLimits, Folder, OpenOptions, Plan, Question, Schedule, Vlm, decode,
    embedded,
};

type Failure = Box<dyn Error>;

const STEPS: usize = 12;
const LEARNING_RATE: f64 = 3e-3;
const WORDS: [&str; 2] = ["where is the big turquoise box", "show me the teal block"];

/// A question, and the tokens of its answer with the one that ends it.
struct Lesson {
    question: Question,
    answer: Vec<u32>,
}

fn open<B: Backend>() -> Result<Vlm<B>, Failure> {
    let (folder, options) = (embedded::checkpoint(), OpenOptions::default());
    Ok(Vlm::open(&folder, &options, &Default::default())?)
}

/// Other words, with the answer that the model, unrouted, gives to those that it knows.
fn lessons<B: Backend>(vlm: &Vlm<B>) -> Result<Vec<Lesson>, Failure> {
    let picture = decode(embedded::SCENE.image, &DecodeLimits::default())?;
    let asked = vlm.grounding().question(embedded::SCENE.expression);
    let known = Question::about(vec![picture.clone()], asked);
    let answer = vlm.ask(
        &known,
        Schedule::dense(),
        &vlm.generation_defaults(),
        |_| {},
    )?;
    println!("{:?}: {}", known.text, answer.text);
    let lesson = |words: &str| Lesson {
        question: Question::about(vec![picture.clone()], words),
        answer: answer.tokens.clone(),
    };
    Ok(WORDS.map(lesson).into())
}

/// The mean cross-entropy of all answers' tokens, `[1]`.
fn loss<B: Backend>(
    vlm: &Vlm<B>,
    lessons: &[Lesson],
    plan: &Plan,
) -> Result<Tensor<B, 1>, Failure> {
    let mut losses = Vec::new();
    for Lesson { question, answer } in lessons {
        // Logits behind the question and behind every token but the last.
        let fed = &answer[..answer.len() - 1];
        let logits = vlm.logits(question, fed, plan)?;
        let expected: Vec<i64> = answer.iter().map(|&id| id.into()).collect();
        let expected = Tensor::<B, 1, Int>::from_data(expected.as_slice(), vlm.device());
        losses.push(
            -log_softmax(logits, 1)
                .gather(1, expected.unsqueeze_dim(1))
                .mean(),
        );
    }
    Ok(Tensor::cat(losses, 0).mean())
}

fn value<B: Backend>(loss: Tensor<B, 1>) -> f32 {
    loss.into_data().iter::<f32>().next().unwrap_or(f32::NAN)
}

fn main() -> Result<(), Failure> {
    let mut vlm = open::<Autodiff<Flex>>()?;
    let plan = vlm.plan("reroute-pdrop@192")?;
    let lessons = lessons(&vlm)?;

    let adapted = vlm.model().adapt(&AdapterConfig::new("all-linear", 8))?;
    println!("{} parameters are trained", adapted.adapter_parameters());
    vlm = vlm.map_model(|_| adapted);
    let before = value(loss(&vlm, &lessons, &plan)?);
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).init();
    for step in 1..=STEPS {
        let loss = loss(&vlm, &lessons, &plan)?;
        println!("step {step:2}: loss {:.4}", value(loss.clone()));
        let gradients = GradientsParams::from_grads(loss.backward(), vlm.model());
        vlm = vlm.map_model(|model| optimizer.step(LEARNING_RATE, model, gradients));
    }
    let after = value(loss(&vlm, &lessons, &plan)?);

    let folder = std::env::temp_dir().join(format!("adapter-{}", std::process::id()));
    vlm.model().save_adapter(&folder)?;
    // Without gradients, as a program that uses the adapter would.
    let fresh = open::<Flex>()?;
    let adapted = fresh.model().load_adapter(&Folder::open(&folder)?)?;
    let tuned = fresh.map_model(|_| adapted);
    let loaded = value(loss(&tuned, &lessons, &plan)?);
    for Lesson { question, .. } in &lessons {
        let answer = tuned.ask(question, &plan, &tuned.generation_defaults(), |_| {})?;
        println!("{:?}: {}", question.text, answer.text);
    }
    std::fs::remove_dir_all(&folder)?;
    println!("loss {before:.4} before, {after:.4} after, {loaded:.4} loaded");
    if after > before / 2.0 || (loaded - after).abs() > 1e-3 {
        return Err("nothing has been learnt, or it was lost".into());
    }
    Ok(())
}
