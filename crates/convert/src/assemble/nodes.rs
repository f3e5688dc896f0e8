//! What the nodes of a tower do with its weights, beyond what every such tower does: that is refused.

use std::collections::BTreeSet;

use reroute_checkpoint::OnnxNode;

/// The epsilon of a `LayerNormalization` that does not say it (ONNX, operators).
const EPSILON: f64 = 1e-5;

/// Whether a node takes the mean from pixels, or divides them by their deviation.
pub(super) fn is_normalisation(node: &OnnxNode) -> bool {
    let is_of_colours = node.inputs.iter().any(|input| input.numbers.len() == 3);
    node.op == "Sub" && is_of_colours
}

/// Refuses nodes that compute something else with these tensors than their modules do.
pub(super) fn check(
    nodes: &[OnnxNode],
    tensors: &BTreeSet<&str>,
    patch: usize,
) -> Result<(), String> {
    for node in nodes {
        let mut inputs = node.inputs.iter();
        if !inputs.any(|input| tensors.contains(input.tensor.as_str())) {
            continue;
        }
        let numbers = |name: &str| node.attributes.get(name).map_or(&[][..], Vec::as_slice);
        let all = |name: &str, wanted: f64| numbers(name).iter().all(|number| *number == wanted);
        let is_usual = match node.op.as_str() {
            "Gemm" => all("alpha", 1.0) && all("beta", 1.0) && all("transA", 0.0),
            "Conv" => {
                let steps = numbers("strides");
                let is_step = if steps.is_empty() {
                    patch == 1
                } else {
                    all("strides", patch as f64)
                };
                is_step && all("pads", 0.0) && all("dilations", 1.0)
            }
            "Sub" | "Div" => false,
            _ => true,
        };
        if !is_usual {
            return Err(format!(
                "its node {} in {:?} computes something else than that module does ({:?}); give the folder of the \
                 checkpoint that it was exported from",
                node.op, node.scope, node.attributes
            ));
        }
    }
    Ok(())
}

/// The epsilon of all norms: an attribute, or the one number that is added in them; `None` if nothing says it.
pub(super) fn epsilon(nodes: &[OnnxNode]) -> Result<Option<f64>, String> {
    let is_norm = |node: &&OnnxNode| {
        node.scope
            .rsplit('.')
            .next()
            .is_some_and(|last| last.contains("norm"))
    };
    let of = |node: &OnnxNode| match node.op.as_str() {
        "LayerNormalization" => {
            let said = node.attributes.get("epsilon").and_then(|said| said.first());
            Some(said.copied().unwrap_or(EPSILON))
        }
        "Add" => node
            .inputs
            .iter()
            .find_map(|input| match input.numbers.as_slice() {
                [number] => Some(*number),
                _ => None,
            }),
        _ => None,
    };
    // As it was written before it became f32.
    let decimal = |number: f64| (number as f32).to_string();
    let found: BTreeSet<String> = nodes
        .iter()
        .filter(is_norm)
        .filter_map(of)
        .map(decimal)
        .collect();
    let mut found = found.iter();
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one.parse().ok()),
        (None, _) => Ok(None),
        (Some(one), Some(other)) => Err(format!(
            "its norms have several epsilons, {one} and {other}, which is not supported"
        )),
    }
}

#[cfg(test)]
mod tests {
    use reroute_checkpoint::OnnxInput;

    use super::*;

    fn node(scope: &str, op: &str, numbers: &[f64], attributes: &[(&str, &[f64])]) -> OnnxNode {
        let attributes = attributes.iter();
        let attributes = attributes.map(|(name, numbers)| ((*name).to_owned(), numbers.to_vec()));
        OnnxNode {
            scope: scope.into(),
            op: op.into(),
            inputs: vec![OnnxInput {
                at: 1,
                tensor: "w".into(),
                is_transposed: false,
                numbers: numbers.to_vec(),
            }],
            attributes: attributes.collect(),
        }
    }

    #[test]
    fn what_nodes_do_beyond_their_modules_is_refused() {
        for (op, attributes, is_good) in [
            (
                "Gemm",
                &[("alpha", &[1.0][..]), ("transB", &[1.0])][..],
                true,
            ),
            ("Gemm", &[("alpha", &[2.0])], false),
            ("Gemm", &[("beta", &[0.5])], false),
            ("Gemm", &[("transA", &[1.0])], false),
            (
                "Conv",
                &[("strides", &[4.0, 4.0]), ("pads", &[0.0; 4])],
                true,
            ),
            ("Conv", &[("strides", &[2.0, 4.0])], false),
            ("Conv", &[], false),
            (
                "Conv",
                &[("strides", &[4.0, 4.0]), ("pads", &[1.0; 4])],
                false,
            ),
            (
                "Conv",
                &[("strides", &[4.0, 4.0]), ("dilations", &[2.0, 2.0])],
                false,
            ),
            ("Sub", &[], false),
            ("Add", &[], true),
        ] {
            let nodes = [node("a", op, &[], attributes)];
            let found = check(&nodes, &BTreeSet::from(["w"]), 4);
            assert_eq!(found.is_ok(), is_good, "{op} {attributes:?}");
            // Of the tower alone.
            assert!(check(&nodes, &BTreeSet::new(), 4).is_ok());
        }
        assert!(is_normalisation(&node("", "Sub", &[0.5; 3], &[])));
        assert!(!is_normalisation(&node("", "Sub", &[0.5], &[])));
    }

    #[test]
    fn an_epsilon_is_that_of_all_norms() {
        let add = |number: f32| node("a.norm1", "Add", &[number.into()], &[]);
        let fused = |said: &[f64]| node("a.norm2", "LayerNormalization", &[], &[("epsilon", said)]);
        let silent = node("a.layernorm", "LayerNormalization", &[], &[]);
        let other = node("a.mlp", "Add", &[0.5], &[]);
        for (nodes, expected) in [
            (vec![other.clone()], Ok(None)),
            (
                vec![add(1e-6), fused(&[f64::from(1e-6_f32)]), other],
                Ok(Some(1e-6)),
            ),
            (vec![silent.clone()], Ok(Some(1e-5))),
            (vec![silent, add(1e-6)], Err(())),
        ] {
            assert_eq!(epsilon(&nodes).map_err(drop), expected);
        }
    }
}
