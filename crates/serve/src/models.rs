//! The models of a server: one, and its adapters, each in a running batch of its own.

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::backend::Backend;
use reroute_zoo::reducers::{Action, Plan, Rest, presets};
use reroute_zoo::session::{MemoryLimit, Service, SessionOptions};
use reroute_zoo::{Vlm, ZooError};
use serde_json::{Value, json};

use crate::refusal::Refusal;
use crate::request::Routed;

/// A model that is served.
pub(crate) struct Served<B: Backend> {
    /// What requests call it.
    pub(crate) id: String,
    pub(crate) vlm: Arc<Vlm<B>>,
    pub(crate) service: Service<B>,
}

/// All models of a server, at least one; the first is the one whose adapters the others are.
pub(crate) struct Models<B: Backend> {
    served: Vec<Served<B>>,
    /// The routing of requests that ask for none, and its name.
    default: (String, Plan),
}

impl<B: Backend> Models<B> {
    /// # Errors
    /// Those of [`Service::start`].
    pub(crate) fn start(
        models: Vec<(String, Arc<Vlm<B>>)>,
        (options, layers): (&SessionOptions, Option<usize>),
        default: (String, Plan),
    ) -> Result<Self, ZooError> {
        let count = models.len() as u64;
        let start = |(id, vlm): (String, Arc<Vlm<B>>)| {
            let mut options = options.clone();
            options.memory = options.memory.map(|limit| share(&vlm, limit, count));
            options.cache_bytes /= count.max(1);
            let quarter = vlm.config().decoder().num_layers.div_ceil(4);
            options.layers_per_step = layers.unwrap_or(quarter);
            let service = Service::start(vlm.clone(), options)?;
            Ok(Served { id, vlm, service })
        };
        let served = models.into_iter().map(start);
        let served = served.collect::<Result<_, ZooError>>()?;
        Ok(Self { served, default })
    }

    pub(crate) fn all(&self) -> &[Served<B>] {
        &self.served
    }

    /// The model of this name; the first one for none.
    pub(crate) fn find(&self, id: Option<&str>) -> Result<&Served<B>, Refusal> {
        let mut all = self.served.iter();
        let found = all.find(|served| id.is_none_or(|id| served.id == id));
        found.ok_or_else(|| {
            let known: Vec<&str> = self
                .served
                .iter()
                .map(|served| served.id.as_str())
                .collect();
            Refusal::model(id.unwrap_or_default(), &known)
        })
    }

    /// The plan that a request asks for, and its name.
    pub(crate) fn plan(&self, routed: Option<Routed>) -> Result<(String, Plan), Refusal> {
        let bad = |error: &dyn std::fmt::Display| Refusal::bad("routing", error);
        let Some(base) = self.served.first() else {
            return Ok(self.default.clone());
        };
        match routed {
            None => Ok(self.default.clone()),
            Some(Routed::Preset(name)) => {
                let plan = base.vlm.plan(&name).map_err(|error| bad(&error))?;
                Ok((name, plan))
            }
            Some(Routed::Plan(plan)) => {
                let shape = base.vlm.config().decoder().shape();
                let fits = plan.schedule.check(&shape);
                fits.map_err(|error| bad(&error))?;
                Ok(("custom".into(), *plan))
            }
        }
    }

    /// As `GET /v1/models` tells it.
    pub(crate) fn list(&self, created: u64) -> Value {
        let models = self.served.iter().map(|served| self.card(served, created));
        json!({"object": "list", "data": models.collect::<Vec<_>>()})
    }

    /// One of them.
    pub(crate) fn card(&self, served: &Served<B>, created: u64) -> Value {
        let base = self.served.first().map(|base| base.id.as_str());
        let parent = base.filter(|base| *base != served.id);
        json!({
            "id": served.id,
            "object": "model",
            "created": created,
            "owned_by": "reroute",
            "parent": parent,
        })
    }

    /// The presets that fit the models, as `GET /v1/routings` tells them.
    pub(crate) fn routings(&self) -> Value {
        let methods = presets::methods().filter_map(|method| {
            let (mut budgets, mut exact, mut action) = (Vec::new(), Vec::new(), None);
            for preset in presets::presets().filter(|preset| preset.method == method) {
                let Some(plan) = self.fitting(&preset.name) else {
                    continue;
                };
                let of_kind = if preset.exact {
                    &mut exact
                } else {
                    &mut budgets
                };
                of_kind.extend(preset.budget);
                action.get_or_insert_with(|| does(&plan));
            }
            Some(json!({
                "id": method.name,
                "action": action?,
                "description": method.about.description,
                "budgets": budgets,
                "exact": exact,
            }))
        });
        json!({"data": methods.collect::<Vec<_>>(), "default": self.default.0})
    }

    fn fitting(&self, preset: &str) -> Option<Plan> {
        self.served.first()?.vlm.plan(preset).ok()
    }
}

/// What a plan does with visual tokens that it does not keep.
fn does(plan: &Plan) -> &'static str {
    let reduces = plan.encoder.as_ref().map(|encoder| encoder.rest);
    match (reduces, plan.schedule.stages().is_empty()) {
        (Some(Rest::Drop), true) => "reduce",
        (None, true) => "none",
        _ => match plan.schedule.action() {
            Action::Reroute => "reroute",
            Action::Remove => "remove",
        },
    }
}

/// A model's part of the memory: the weights, which all share, and an equal part of what is left.
fn share<B: Backend>(vlm: &Vlm<B>, limit: MemoryLimit, models: u64) -> MemoryLimit {
    let weights = (vlm.model().num_params() as u64).saturating_mul(vlm.dtype().size() as u64);
    let left = limit.bytes.saturating_sub(weights) / models.max(1);
    MemoryLimit {
        bytes: weights.saturating_add(left).min(limit.bytes),
        ..limit
    }
}
