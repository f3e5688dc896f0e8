//! What is measured, and how it is asked for: names, files and prompts of lmms-eval 0.7.

use serde::{Deserialize, Serialize};

use reroute_zoo::grounding::GroundingFormat;

use crate::{EvalError, Sample, Truth};

/// What the harness puts behind a question that is to be answered in a word.
const SHORT_ANSWER: &str = "\nAnswer the question using a single word or phrase.";

/// Where the harness ends an answer to RefCOCO and TextVQA.
const STOP: &str = "ASSISTANT:";

/// A set of questions with known answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Task {
    /// RefCOCO: expressions that may say where something stands.
    #[serde(rename = "refcoco")]
    RefCoco,
    /// RefCOCO+: expressions that do not.
    #[serde(rename = "refcoco+")]
    RefCocoPlus,
    /// RefCOCOg: longer expressions.
    #[serde(rename = "refcocog")]
    RefCocoG,
    /// POPE: whether something is in the picture.
    #[serde(rename = "pope")]
    Pope,
    /// GQA.
    #[serde(rename = "gqa")]
    Gqa,
    /// TextVQA.
    #[serde(rename = "textvqa")]
    TextVqa,
    /// Lines of JSON of one's own.
    #[serde(rename = "own")]
    Own,
}

/// How boxes are asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroundingPrompt {
    /// As the model was trained to be asked.
    #[default]
    Family,
    /// The harness's, which the paper asks LLaVA with.
    Full,
    /// Its last sentence.
    Short,
    /// That of Nüwa, which the paper asks Qwen-VL with.
    Nuwa,
}

impl Task {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::RefCoco,
        Self::RefCocoPlus,
        Self::RefCocoG,
        Self::Pope,
        Self::Gqa,
        Self::TextVqa,
        Self::Own,
    ];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::RefCoco => "refcoco",
            Self::RefCocoPlus => "refcoco+",
            Self::RefCocoG => "refcocog",
            Self::Pope => "pope",
            Self::Gqa => "gqa",
            Self::TextVqa => "textvqa",
            Self::Own => "own",
        }
    }

    /// The task of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name)
    }

    /// The split that is meant where none is named.
    pub fn default_split(self) -> &'static str {
        match self {
            Self::RefCoco | Self::RefCocoPlus | Self::RefCocoG => "val",
            Self::Pope => "test",
            Self::Gqa => "testdev",
            Self::TextVqa => "validation",
            Self::Own => "all",
        }
    }

    /// The splits that have answers.
    pub fn splits(self) -> &'static [&'static str] {
        match self {
            Self::RefCoco => &["val", "test", "testA", "testB"],
            Self::RefCocoPlus => &["val", "testA", "testB"],
            Self::RefCocoG => &["val", "test"],
            _ => std::slice::from_ref(match self {
                Self::Pope => &"test",
                Self::Gqa => &"testdev",
                Self::TextVqa => &"validation",
                _ => &"all",
            }),
        }
    }

    /// Where the data are on the hub.
    pub fn repository(self) -> &'static str {
        match self {
            Self::RefCoco => "lmms-lab-encoder/RefCOCO",
            Self::RefCocoPlus => "lmms-lab-encoder/RefCOCOplus",
            Self::RefCocoG => "lmms-lab-encoder/RefCOCOg",
            Self::Pope => "lmms-lab-encoder/POPE",
            Self::Gqa => "lmms-lab-encoder/GQA",
            Self::TextVqa => "lmms-lab-encoder/textvqa",
            Self::Own => "OWNER/NAME",
        }
    }

    /// Tokens of an answer at most: the harness's for POPE and GQA; what its Qwen wrappers have for the others.
    pub fn max_new_tokens(self) -> usize {
        match self {
            Self::Gqa => 16,
            _ => 128,
        }
    }

    /// What ends an answer.
    pub fn stop(self) -> Vec<String> {
        match self {
            Self::RefCoco | Self::RefCocoPlus | Self::RefCocoG | Self::TextVqa => {
                vec![STOP.to_string()]
            }
            Self::Pope | Self::Gqa | Self::Own => Vec::new(),
        }
    }

    /// The text that a sample is asked with, behind its picture.
    pub fn prompt(
        self,
        sample: &Sample,
        prompt: GroundingPrompt,
        family: &GroundingFormat,
    ) -> String {
        let question = &sample.question;
        if let Truth::Box(_) = sample.truth {
            return prompt.of(question, family);
        }
        match self {
            Self::Own => question.clone(),
            Self::Pope => format!("{}{SHORT_ANSWER}", question.trim()),
            Self::TextVqa => format!("{}{SHORT_ANSWER}", capitalized(question)),
            _ => format!("{question}{SHORT_ANSWER}"),
        }
    }
}

impl std::str::FromStr for Task {
    type Err = EvalError;

    fn from_str(name: &str) -> Result<Self, EvalError> {
        Self::named(name).ok_or_else(|| EvalError::Setting {
            setting: "the task",
            reason: format!(
                "is one of {}, not {name}",
                Self::ALL.map(Self::name).join(", ")
            ),
        })
    }
}

impl GroundingPrompt {
    /// The question for an expression.
    pub fn of(self, expression: &str, family: &GroundingFormat) -> String {
        const ASKED: &str =
            "Please provide the bounding box coordinate of the region this sentence describes: ";
        match self {
            Self::Family => family.question(expression),
            Self::Full => format!(
                "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, \
                 bottom-right y). All values are floating point numbers bounded between 0 and 1. \
                 {ASKED}{expression}"
            ),
            Self::Short => format!("{ASKED}{expression}"),
            Self::Nuwa => format!(
                "Locate {expression} in this image and output the bbox coordinates in JSON format."
            ),
        }
    }
}

/// Python's `str.capitalize`, which also makes everything behind the first letter small.
fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    let Some(first) = letters.next() else {
        return String::new();
    };
    let mut upper = first.to_uppercase();
    let head: String = upper.next().into_iter().collect();
    let tail: String = upper.chain(letters).collect();
    head + &tail.to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_vqa_makes_all_but_the_first_letter_small() {
        // What Python says of each.
        for (text, expected) in [
            ("what is the IBM logo?", "What is the ibm logo?"),
            ("ÉCOLE", "École"),
            ("ßa", "Ssa"),
            ("", ""),
            (" X", " x"),
        ] {
            assert_eq!(capitalized(text), expected);
        }
    }

    #[test]
    fn tasks_go_by_their_names() {
        for task in Task::ALL {
            assert_eq!(task.name().parse::<Task>().expect("its name"), task);
            assert_eq!(
                serde_json::to_string(&task).expect("JSON"),
                format!("\"{}\"", task.name())
            );
            assert!(task.splits().contains(&task.default_split()));
        }
        let error = "coco".parse::<Task>().expect_err("no task").to_string();
        assert!(error.contains("refcoco+"), "{error}");
    }
}
