//! Answers in words.

use std::sync::LazyLock;

use fancy_regex::Regex;

/// Whether an answer is the right one when case and ASCII punctuation count for nothing (GQA).
pub fn exact(answer: &str, right: &str) -> bool {
    let bare = |text: &str| -> String {
        let letters = text.to_lowercase();
        letters
            .chars()
            .filter(|letter| !letter.is_ascii_punctuation())
            .collect()
    };
    bare(answer) == bare(right)
}

/// What an answer says; it must be the word alone, in any case (POPE). "Yes." says nothing.
pub fn yes_or_no(answer: &str) -> Option<bool> {
    match answer.trim().to_lowercase().as_str() {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    }
}

/// How many of several people agree (VQA): a third of those who do, at most 1, averaged over leaving out each in turn.
pub fn leave_one_out(answer: &str, answers: &[String]) -> f64 {
    let said = evalai(answer);
    let agrees: Vec<bool> = answers
        .iter()
        .map(|answer| evalai(answer) == said)
        .collect();
    let count = agrees.iter().filter(|agrees| **agrees).count();
    let left = agrees.iter().map(|&agrees| {
        let others = count - usize::from(agrees);
        (others as f64 / 3.0).min(1.0)
    });
    left.sum::<f64>() / answers.len().max(1) as f64
}

const PUNCTUATION: [char; 21] = [
    ';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',',
    '?', '!',
];

/// Full stops that no digit follows.
static FULL_STOP: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"\.(?!\d)").ok());
/// The harness hands the flag for Unicode, 32, to the parameter that says how many are taken out.
const FULL_STOPS: usize = 32;

/// An answer in the form in which EvalAI compares answers: small letters, without articles and most punctuation, with
/// numbers to ten in digits and apostrophes where they belong. As the harness has it, slips included.
pub fn evalai(answer: &str) -> String {
    let text = answer.to_lowercase();
    let text = text.replace([',', '?'], "").replace("'s", " 's");
    let text = trimmed(&text).replace(['\n', '\t'], " ");
    words(&without_punctuation(trimmed(&text)))
}

fn without_punctuation(text: &str) -> String {
    let mut out = text.to_string();
    for mark in PUNCTUATION {
        // Commas are gone by now, so that none between digits can matter.
        let is_apart = text.contains(&format!("{mark} ")) || text.contains(&format!(" {mark}"));
        out = out.replace(mark, if is_apart { "" } else { " " });
    }
    match &*FULL_STOP {
        Some(stop) => stop.replacen(&out, FULL_STOPS, "").into_owned(),
        None => out,
    }
}

fn words(text: &str) -> String {
    let text = text.to_lowercase();
    let words = text.split(is_blank).filter(|word| !word.is_empty());
    let words = words.map(|word| {
        let digits = NUMBERS.iter().position(|number| *number == word);
        match (word, digits) {
            ("none", _) => "0",
            (_, Some(digit)) => DIGITS[digit],
            _ => word,
        }
    });
    let words = words.filter(|word| !matches!(*word, "a" | "an" | "the"));
    let words = words.map(|word| {
        let known = CONTRACTIONS.iter().find(|(without, _)| *without == word);
        known.map_or(word, |(_, with)| with)
    });
    words.collect::<Vec<_>>().join(" ")
}

/// What Python takes for white space.
fn is_blank(letter: char) -> bool {
    letter.is_whitespace() || ('\x1c'..='\x1f').contains(&letter)
}

fn trimmed(text: &str) -> &str {
    text.trim_matches(is_blank)
}

const NUMBERS: [&str; 11] = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
];
const DIGITS: [&str; 11] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"];

/// Words whose apostrophes are missing or misplaced. (Those with a capital are never met, for letters are small by then.)
#[rustfmt::skip]
const CONTRACTIONS: [(&str, &str); 114] = [
    ("aint", "ain't"), ("arent", "aren't"), ("cant", "can't"), ("couldve", "could've"), ("couldnt", "couldn't"),
    ("couldn'tve", "couldn't've"), ("couldnt've", "couldn't've"), ("didnt", "didn't"), ("doesnt", "doesn't"),
    ("dont", "don't"), ("hadnt", "hadn't"), ("hadnt've", "hadn't've"), ("hadn'tve", "hadn't've"), ("hasnt", "hasn't"),
    ("havent", "haven't"), ("hed", "he'd"), ("hed've", "he'd've"), ("he'dve", "he'd've"), ("hes", "he's"),
    ("howd", "how'd"), ("howll", "how'll"), ("hows", "how's"), ("isnt", "isn't"), ("itd", "it'd"),
    ("itd've", "it'd've"), ("it'dve", "it'd've"), ("itll", "it'll"), ("maam", "ma'am"), ("mightnt", "mightn't"),
    ("mightnt've", "mightn't've"), ("mightn'tve", "mightn't've"), ("mightve", "might've"), ("mustnt", "mustn't"),
    ("mustve", "must've"), ("neednt", "needn't"), ("notve", "not've"), ("oclock", "o'clock"), ("oughtnt", "oughtn't"),
    ("ow's'at", "'ow's'at"), ("'ows'at", "'ow's'at"), ("'ow'sat", "'ow's'at"), ("shant", "shan't"),
    ("shed've", "she'd've"), ("she'dve", "she'd've"), ("shouldve", "should've"), ("shouldnt", "shouldn't"),
    ("shouldnt've", "shouldn't've"), ("shouldn'tve", "shouldn't've"), ("somebody'd", "somebodyd"),
    ("somebodyd've", "somebody'd've"), ("somebody'dve", "somebody'd've"), ("somebodyll", "somebody'll"),
    ("somebodys", "somebody's"), ("someoned", "someone'd"), ("someoned've", "someone'd've"),
    ("someone'dve", "someone'd've"), ("someonell", "someone'll"), ("someones", "someone's"),
    ("somethingd", "something'd"), ("somethingd've", "something'd've"), ("something'dve", "something'd've"),
    ("somethingll", "something'll"), ("thats", "that's"), ("thered", "there'd"), ("thered've", "there'd've"),
    ("there'dve", "there'd've"), ("therere", "there're"), ("theres", "there's"), ("theyd", "they'd"),
    ("theyd've", "they'd've"), ("they'dve", "they'd've"), ("theyll", "they'll"), ("theyre", "they're"),
    ("theyve", "they've"), ("twas", "'twas"), ("wasnt", "wasn't"), ("wed've", "we'd've"), ("we'dve", "we'd've"),
    ("weve", "we've"), ("werent", "weren't"), ("whatll", "what'll"), ("whatre", "what're"), ("whats", "what's"),
    ("whatve", "what've"), ("whens", "when's"), ("whered", "where'd"), ("wheres", "where's"), ("whereve", "where've"),
    ("whod", "who'd"), ("whod've", "who'd've"), ("who'dve", "who'd've"), ("wholl", "who'll"), ("whos", "who's"),
    ("whove", "who've"), ("whyll", "why'll"), ("whyre", "why're"), ("whys", "why's"), ("wont", "won't"),
    ("wouldve", "would've"), ("wouldnt", "wouldn't"), ("wouldnt've", "wouldn't've"), ("wouldn'tve", "wouldn't've"),
    ("yall", "y'all"), ("yall'll", "y'all'll"), ("y'allll", "y'all'll"), ("yall'd've", "y'all'd've"),
    ("y'alld've", "y'all'd've"), ("y'all'dve", "y'all'd've"), ("youd", "you'd"), ("youd've", "you'd've"),
    ("you'dve", "you'd've"), ("youll", "you'll"), ("youre", "you're"), ("youve", "you've"),
];
