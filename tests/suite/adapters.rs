//! Low-rank adapters: beside the weights, in them, trained through a routed prefill, and on disk.

mod files;
mod program;
mod whole;

use burn::module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{AdamConfig, GradientsParams, Optimizer};
use burn::tensor::backend::Backend as AnyBackend;
use burn::tensor::{DType, Tensor};
use reducers::{Action, Schedule};
use reroute_cli::backend::{Backend, Device};
use reroute_layers::{Linear, Linears};
use reroute_zoo::{AdapterConfig, AdapterError, Model, Targets, Vlm, ZooError};

use crate::golden::{open, open_as, open_at};
use crate::support::{Random, alone, gap, values};
use crate::training::{self, Ad, gradients, loss, question};

const FAMILIES: [&str; 4] = ["llava", "qwen2vl", "qwen25vl", "qwen3vl"];

/// Towers that name their maps otherwise.
const VARIANTS: [&str; 4] = ["clip_layers", "siglip_qwen2", "dinov2", "dinov2_swiglu"];

/// A known answer, so that rows behind the prefill take part.
const ANSWER: [u32; 2] = [17, 5];

fn schedules() -> [Schedule; 2] {
    [
        Schedule::dense(),
        training::schedule(Action::Reroute, [1, 3, 6]),
    ]
}

fn variant(name: &str) -> Vlm<Backend> {
    open_at(&format!("llava_variants/{name}"), DType::F32)
}

fn logits<B: AnyBackend<Device = Device>>(vlm: &Vlm<B>, schedule: &Schedule) -> Vec<f32> {
    values(
        vlm.logits(&question(), &ANSWER, schedule)
            .expect("a good question"),
    )
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

fn with_model<B: AnyBackend<Device = Device>>(vlm: Vlm<B>, model: Model<B>) -> Vlm<B> {
    vlm.map_model(|_| model)
}

/// Random numbers for every adapter, both factors, as large as the weights of the model; everything
/// else as it is.
struct Trained {
    random: Random,
    path: Vec<String>,
}

impl<B: AnyBackend> ModuleMapper<B> for Trained {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }
    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if !self.path.iter().any(|name| name == "adapter") {
            return param;
        }
        param.map(|value| {
            let scale = 1.0 / (value.dims()[1] as f32).sqrt();
            let numbers = self.random.vector(value.shape().num_elements());
            let numbers: Vec<f32> = numbers.into_iter().map(|x| scale * x).collect();
            let flat = Tensor::<B, 1>::from_data(&numbers[..], (&value.device(), DType::F32));
            let is_trained = value.is_require_grad();
            flat.reshape(value.shape()).set_require_grad(is_trained)
        })
    }
}

/// The model with an adapter that says something.
fn adapted<B: AnyBackend>(model: &Model<B>, config: &AdapterConfig) -> Model<B> {
    let model = model.adapt(config).expect("good targets");
    let (random, path) = (Random::new(7), Vec::new());
    model.map(&mut Trained { random, path })
}

fn all_linear(rank: usize) -> AdapterConfig {
    AdapterConfig::new("all-linear", rank)
}

fn linears<B: AnyBackend>(model: &mut Model<B>) -> Vec<(String, &mut Linear<B>)> {
    let mut found = Vec::new();
    model.linears("", &mut found);
    found
}

/// Names of the maps that have an adapter.
fn names(model: &Model<Backend>) -> Vec<String> {
    let mut clone = model.clone();
    let adapted = linears(&mut clone).into_iter();
    adapted
        .filter(|(_, linear)| linear.adapter.is_some())
        .map(|(path, _)| model.config().file_name(&format!("{path}.weight")))
        .map(|name| name.expect("every weight has a name"))
        .collect()
}

/// What Burn knows of a model and what is reached for adapters are the same maps.
#[test]
fn every_linear_map_of_every_family_is_reached() {
    #[derive(Default)]
    struct Collect(Vec<(String, String)>, Vec<String>);
    impl ModuleVisitor<Backend> for Collect {
        fn enter_module(&mut self, name: &str, kind: &str) {
            self.0.push((name.into(), kind.into()));
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<Backend, D>>) {
            let (name, kind) = self.0.last().expect("a field");
            if (name.as_str(), kind.as_str()) == ("weight", "Struct:Linear") {
                // Without the family in front and the field behind.
                let path = &self.0[1..self.0.len() - 1];
                let path: Vec<&str> = path.iter().map(|(name, _)| name.as_str()).collect();
                self.1.push(path.join("."));
            }
        }
    }
    let families = FAMILIES.into_iter().map(open);
    for vlm in families.chain(VARIANTS.into_iter().map(variant)) {
        let mut collect = Collect::default();
        vlm.model().visit(&mut collect);
        let mut model = vlm.model().clone();
        let reached: Vec<String> = linears(&mut model)
            .into_iter()
            .map(|(path, _)| path)
            .collect();
        assert_eq!(reached, collect.1);
        assert!(reached.len() > 30);
    }
}

/// As PEFT begins: what maps down is random, what maps up is zero.
#[test]
fn an_untrained_adapter_changes_no_bit() {
    for family in FAMILIES {
        let vlm = open(family);
        let before = schedules().map(|schedule| bits(&logits(&vlm, &schedule)));
        let model = vlm.model().adapt(&all_linear(4)).expect("good targets");
        let vlm = with_model(vlm, model);
        let after = schedules().map(|schedule| bits(&logits(&vlm, &schedule)));
        assert!(before == after, "{family}");
    }
}

/// The same change beside the weights and in them: decoder, projector or mergers, DeepStack's too, and
/// tower; plain and routed.
#[test]
fn an_adapter_beside_the_weights_is_one_in_them() {
    let config = AdapterConfig {
        alpha: 1.5,
        rank_stabilized: true,
        ..all_linear(3)
    };
    let families = FAMILIES.map(|family| (family, open(family)));
    let variants = VARIANTS.map(|name| (name, variant(name)));
    for (name, vlm) in families.into_iter().chain(variants) {
        let is_variant = VARIANTS.contains(&name);
        for schedule in schedules().iter().take(if is_variant { 1 } else { 2 }) {
            let plain = logits(&vlm, schedule);
            let model = adapted(vlm.model(), &config);
            let with = |model| {
                let vlm = open_like(name);
                logits(&with_model(vlm, model), schedule)
            };
            let beside = with(model.clone());
            let merged = with(model.clone().merge_adapters());
            let without = with(model.without_adapters());
            assert!(gap(&beside, &plain) > 0.1, "{name}: nothing is tested");
            let difference = gap(&beside, &merged);
            assert!(difference < 2e-4, "{name}: {difference}");
            assert!(bits(&without) == bits(&plain), "{name}");
        }
    }
}

fn open_like(name: &str) -> Vlm<Backend> {
    match VARIANTS.contains(&name) {
        true => variant(name),
        false => open(name),
    }
}

/// Half precision: the adapter is f32, the model computes in its own type, and both ways are about as
/// far from f32 as the model without the adapter.
#[test]
fn an_adapter_of_a_model_in_half_precision() {
    let schedule = Schedule::dense();
    let single = open("qwen25vl");
    let plain = logits(&single, &schedule);
    let model = adapted(single.model(), &all_linear(3));
    let expected = logits(&with_model(single, model), &schedule);
    for dtype in [DType::F16, DType::BF16] {
        if !Backend::supports_dtype(&Device::default(), dtype) {
            continue;
        }
        let vlm = open_as::<Backend>("qwen25vl", dtype);
        let usual = gap(&logits(&vlm, &schedule), &plain);
        let mut model = adapted(vlm.model(), &all_linear(3));
        let adapters = linears(&mut model).into_iter();
        let types = adapters.filter_map(|(_, linear)| Some(linear.adapter.as_ref()?.up.val()));
        assert!({ types }.all(|up| up.dtype() == DType::F32));
        let vlm = with_model(vlm, model);
        assert_eq!(vlm.dtype(), dtype);
        let beside = gap(&logits(&vlm, &schedule), &expected);
        let merged = vlm.map_model(Model::merge_adapters);
        let merged = gap(&logits(&merged, &schedule), &expected);
        assert!(
            beside.max(merged) < 4.0 * usual,
            "{dtype:?}: {beside} and {merged}, where {usual} is usual"
        );
    }
}

/// Ends of names, a pattern, everything; counted, and by what checkpoints call them.
#[test]
fn targets_mean_what_they_say() {
    let count = |family: &str, targets: Targets| {
        let vlm = open(family);
        let model = vlm.model().adapt(&AdapterConfig::new(targets, 2));
        names(&model.expect("good targets"))
    };
    // 8 layers of the decoder; 4 or 5 of the tower, which is CLIP or has its projections as one.
    for (family, targets, expected) in [
        ("llava", Targets::from("q_proj"), 12),
        ("llava", ["q_proj", "v_proj"].into(), 24),
        ("llava", ["language_model.*.q_proj"].into(), 8),
        ("llava", ["mlp.gate_proj", "linear_1"].into(), 9),
        ("llava", ["layers.3.self_attn.out_proj"].into(), 1),
        ("llava", "all-linear".into(), 8 * 7 + 4 * 6 + 2),
        ("qwen25vl", ["q_proj"].into(), 8),
        ("qwen25vl", ["attn.qkv", "attn.proj"].into(), 8),
        ("qwen25vl", ["gate_proj"].into(), 12),
        ("qwen25vl", ["visual.merger.*"].into(), 2),
        ("qwen25vl", "all-linear".into(), 8 * 7 + 4 * 5 + 2),
        // Its tower calls nothing up_proj, as that of Qwen2.5-VL does.
        ("qwen2vl", ["up_proj"].into(), 8),
        ("qwen3vl", ["linear_fc1"].into(), 5 + 1 + 3),
    ] {
        let found = count(family, targets.clone());
        assert_eq!(found.len(), expected, "{family} {targets:?}: {found:?}");
    }
    let found = count("qwen25vl", ["merger.mlp.0"].into());
    assert_eq!(found, ["visual.merger.mlp.0.weight"]);
}

/// What is trained is counted, and ranks and alphas of single maps are their own.
#[test]
fn patterns_give_single_maps_their_own_strength() {
    let config = AdapterConfig {
        alpha: 8.0,
        rank_pattern: vec![("layers.0.self_attn.q_proj".into(), 2)],
        alpha_pattern: vec![("v_proj".into(), 3.0)],
        ..AdapterConfig::new(["language_model.*.q_proj", "language_model.*.v_proj"], 4)
    };
    let vlm = open("llava");
    let mut model = vlm.model().adapt(&config).expect("good targets");
    assert_eq!(model.adapter_parameters(), (2 * 8 * 4 - 2) * (96 + 96));
    for (path, linear) in linears(&mut model) {
        let Some(adapter) = &linear.adapter else {
            continue;
        };
        let first = path.ends_with("layers.0.self_attn.q_proj");
        assert_eq!(adapter.rank(), if first { 2 } else { 4 }, "{path}");
        let alpha = if path.ends_with("v_proj") { 3.0 } else { 8.0 };
        assert_eq!(adapter.scaling.alpha, alpha, "{path}");
    }
    let numbers = |config: &AdapterConfig| {
        let mut model = vlm.model().adapt(config).expect("good targets");
        let adapters = linears(&mut model).into_iter();
        let downs = adapters.filter_map(|(_, linear)| linear.adapter.take());
        downs
            .flat_map(|adapter| values(adapter.down.val()))
            .collect::<Vec<f32>>()
    };
    let first = numbers(&config);
    assert!(first == numbers(&config), "equal seeds make equal numbers");
    let other = AdapterConfig { seed: 1, ..config };
    assert!(first != numbers(&other), "other seeds others");
    let bound = 1.0 / 96f32.sqrt();
    assert!(first.iter().all(|x| x.abs() <= bound) && first.iter().any(|x| x.abs() > 0.9 * bound));
}

/// Through a routed prefill gradients reach adapters of decoder, projector or merger, DeepStack and
/// tower, as finite differences say; nothing else has any.
#[test]
fn only_adapters_have_gradients_and_they_are_those_of_finite_differences() {
    let _alone = alone();
    let parameters = [
        [
            "vision_tower.encoder.layers.1.self_attn.q_proj.adapter.down",
            "multi_modal_projector.linear_1.adapter.up",
            "language_model.layers.0.self_attn.k_proj.adapter.down",
            "language_model.layers.6.mlp.down_proj.adapter.up",
        ],
        [
            "visual.blocks.3.attn.qkv.adapter.down",
            "visual.deepstack_merger_list.1.fc1.adapter.up",
            "language_model.layers.0.self_attn.k_proj.adapter.up",
            "language_model.layers.6.mlp.down_proj.adapter.down",
        ],
    ];
    let schedule = training::schedule(Action::Reroute, [1, 3, 6]);
    for (family, parameters) in training::FAMILIES.into_iter().zip(parameters) {
        let vlm = open_as::<Ad>(family, DType::F32);
        let model = adapted(vlm.model(), &all_linear(2));
        let vlm = with_model(vlm, model);
        let gradients = gradients(&vlm, &loss(&vlm, &schedule).backward());
        training::assert_reached(&gradients, |path| path.contains(".adapter."));
        training::assert_numeric(vlm, &schedule, &gradients, &parameters, 5e-3);
    }
}

/// A few steps lower the loss; the weights stay what they were, to the bit.
#[test]
fn an_adapter_learns_an_answer_under_routing() {
    let _alone = alone();
    for family in training::FAMILIES {
        let schedule = training::schedule(Action::Reroute, [1, 3, 6]);
        let vlm = open_as::<Ad>(family, DType::F32);
        let model = vlm.model().adapt(&all_linear(4)).expect("good targets");
        let mut vlm = with_model(vlm, model);
        let mut optimizer = AdamConfig::new().init();
        let mut losses = Vec::new();
        for _ in 0..10 {
            let loss = loss(&vlm, &schedule);
            losses.push(loss.clone().into_scalar());
            let gradients = GradientsParams::from_grads(loss.backward(), vlm.model());
            vlm = vlm.map_model(|model| optimizer.step(1e-2, model, gradients));
        }
        assert!(losses[9] < 0.2 * losses[0], "{family}: {losses:?}");
        let trained = vlm.map_model(|model| model.valid());
        let plain = with_model(open(family), trained.model().clone().without_adapters());
        let [known, found] = [&open(family), &plain].map(|vlm| bits(&logits(vlm, &schedule)));
        assert!(known == found, "{family}");
        let merged = loss(&trained.map_model(Model::merge_adapters), &schedule).into_scalar();
        assert!(merged < 0.2 * losses[0], "{family}: {merged}");
    }
}

#[track_caller]
fn refused(result: Result<Model<Backend>, ZooError>) -> AdapterError {
    match result {
        Err(ZooError::Adapter(error)) => error,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("nothing is refused"),
    }
}

/// What cannot be is told before anything is made.
#[test]
fn a_bad_configuration_is_refused() {
    let vlm = open("llava");
    let adapt = |config: AdapterConfig| refused(vlm.model().adapt(&config));
    for rank in [0, 97, usize::MAX] {
        let error = adapt(AdapterConfig::new("o_proj", rank));
        assert!(
            matches!(error, AdapterError::Rank { rank: found, most: 96, .. } if found == rank),
            "{error}"
        );
    }
    for alpha in [f64::NAN, f64::INFINITY, 1e300, 0.0] {
        let config = AdapterConfig {
            alpha,
            ..all_linear(2)
        };
        assert!(matches!(adapt(config), AdapterError::Alpha { .. }));
        let config = AdapterConfig {
            alpha_pattern: vec![("linear_2".into(), alpha)],
            ..all_linear(2)
        };
        assert!(matches!(adapt(config), AdapterError::Alpha { .. }));
    }
    let none: [&str; 0] = [];
    let error = adapt(AdapterConfig::new(none, 2));
    assert!(matches!(error, AdapterError::NoTargets), "{error}");

    let targets = ["q_proj", "qproj", "proj", "", "a.*.b.*", "language_model"];
    let error = adapt(AdapterConfig::new(targets, 2));
    let AdapterError::UnknownTarget { targets, linears } = &error else {
        panic!("{error}");
    };
    assert_eq!(targets, &["qproj", "proj", "", "a.*.b.*", "language_model"]);
    assert_eq!(linears.len(), 15, "{error}");
    let named = "language_model.model.layers.{}.self_attn.q_proj";
    assert!(error.to_string().contains(named), "{error}");
    let config = AdapterConfig {
        rank_pattern: vec![("q_prj".into(), 2)],
        ..all_linear(2)
    };
    assert!(matches!(adapt(config), AdapterError::UnknownTarget { .. }));

    for target in ["lm_head", "embed_tokens", "language_model.*.embed_tokens"] {
        let error = adapt(AdapterConfig::new(["q_proj", target], 2));
        let AdapterError::Vocabulary { targets } = &error else {
            panic!("{error}");
        };
        assert_eq!(targets, &[target]);
    }

    let model = vlm.model().adapt(&all_linear(2)).expect("good targets");
    let error = refused(model.adapt(&all_linear(2)));
    assert!(matches!(error, AdapterError::Adapted), "{error}");
}
