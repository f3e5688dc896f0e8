//! The samples of a split, without their pictures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use crate::sample::{PictureAt, Sample, Truth};
use crate::table::{Cells, Table};
use crate::{EvalError, Task, hub, own};

/// The samples of a split.
#[derive(Debug)]
pub struct Data {
    /// What they are of.
    pub task: Task,
    /// Which of its splits.
    pub split: String,
    /// In the order of the files.
    pub samples: Vec<Sample>,
    /// The files that they were read from.
    pub fingerprint: Fingerprint,
    /// The tables that have the pictures.
    tables: Vec<PathBuf>,
}

/// Tells data from others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Names of the files and their bytes.
    pub files: Vec<(String, u64)>,
    /// XXH3 of all questions and answers.
    pub questions: String,
}

impl Data {
    /// Reads all but the pictures. `path` is a folder as the hub has it, or the hub's cache; of one's own data, the
    /// file of lines.
    ///
    /// # Errors
    /// What is missing or wrong in the files; see [`EvalError`].
    pub fn open(task: Task, split: &str, path: &Path) -> Result<Self, EvalError> {
        let mut read = Read::default();
        let (files, tables) = match task {
            Task::Own if split != task.default_split() => {
                return Err(EvalError::Setting {
                    setting: "the split",
                    reason: format!("of one's own lines is all of them, not {split}: leave it out"),
                });
            }
            Task::Own => {
                read.samples = own::read(path)?;
                (vec![path.to_owned()], Vec::new())
            }
            Task::Gqa => {
                let config = |what| format!("{split}_balanced_{what}");
                // What stands in front of `_balanced` in a configuration is the name of its split.
                let pictures = hub::files(task, path, Some(&config("images")), split)?;
                let tables = hub::files(task, path, Some(&config("instructions")), split)?;
                let places = named_pictures(&pictures)?;
                for path in &tables {
                    read.gqa(&Table::open(path)?, &places)?;
                }
                ([tables, pictures.clone()].concat(), pictures)
            }
            _ => {
                let config = None;
                let tables = hub::files(task, path, config, split)?;
                for (at, path) in tables.iter().enumerate() {
                    let table = Table::open(path)?;
                    table.check_pictures()?;
                    match task {
                        Task::Pope => read.pope(at, &table)?,
                        Task::TextVqa => read.text_vqa(at, &table)?,
                        _ => read.grounding(at, &table)?,
                    }
                }
                (tables.clone(), tables)
            }
        };
        if read.samples.is_empty() {
            return Err(EvalError::NoSamples {
                path: path.to_owned(),
                what: format!("the split {split}"),
            });
        }
        let fingerprint = Fingerprint::of(&files, &read.samples)?;
        Ok(Self {
            task,
            split: split.into(),
            samples: read.samples,
            fingerprint,
            tables,
        })
    }

    /// Whether boxes are asked for.
    pub fn has_boxes(&self) -> bool {
        let mut samples = self.samples.iter();
        samples.any(|sample| matches!(sample.truth, Truth::Box(_)))
    }

    /// What reads the pictures.
    pub fn pictures(&self) -> Pictures<'_> {
        Pictures {
            tables: &self.tables,
            open: None,
        }
    }
}

impl Fingerprint {
    fn of(files: &[PathBuf], samples: &[Sample]) -> Result<Self, EvalError> {
        let about = |path: &PathBuf| {
            let name = path.file_name().map(|name| name.display().to_string());
            let folder = path.parent().and_then(Path::file_name);
            let folder = folder.map(|name| format!("{}/", name.display()));
            let bytes = std::fs::metadata(path).map_err(EvalError::io(path))?.len();
            // Of GQA, two files of one name.
            let folder = folder.filter(|_| files.len() > 1).unwrap_or_default();
            Ok((folder + &name.unwrap_or_default(), bytes))
        };
        let mut hash = Xxh3::new();
        for sample in samples {
            let picture = match &sample.picture {
                PictureAt::Table { table, row } => format!("{table}, {row}"),
                PictureAt::File(path) => path
                    .file_name()
                    .map_or(String::new(), |name| name.display().to_string()),
            };
            let truth = serde_json::to_vec(&(&sample.question, &sample.truth, picture));
            hash.update(&truth.unwrap_or_default());
        }
        Ok(Self {
            files: files.iter().map(about).collect::<Result<_, EvalError>>()?,
            questions: format!("{:016x}", hash.digest()),
        })
    }
}

/// The places of pictures by their names.
fn named_pictures(paths: &[PathBuf]) -> Result<BTreeMap<String, PictureAt>, EvalError> {
    let mut places = BTreeMap::new();
    for (table, path) in paths.iter().enumerate() {
        let pictures = Table::open(path)?;
        pictures.check_pictures()?;
        pictures.rows(&["id"], &[], &mut |cells| {
            let row = cells.row;
            places.insert(named(&cells, "id")?, PictureAt::Table { table, row });
            Ok(())
        })?;
    }
    Ok(places)
}

fn named(cells: &Cells<'_>, column: &str) -> Result<String, EvalError> {
    let name = cells.name(column);
    name.ok_or_else(|| cells.refuse(column, "a name or a number"))
}

/// What has been read so far.
#[derive(Default)]
struct Read {
    samples: Vec<Sample>,
}

impl Read {
    fn push(
        &mut self,
        cells: &Cells<'_>,
        (question, truth): (String, Truth),
        category: Option<String>,
        picture: PictureAt,
    ) {
        let names = ["question_id", "id"];
        let id = names.into_iter().find_map(|name| cells.name(name));
        self.samples.push(Sample {
            index: self.samples.len(),
            id: id.unwrap_or_else(|| cells.row.to_string()),
            question,
            truth,
            category,
            picture,
        });
    }

    /// RefCOCO: a row is an object, each of its expressions a sample.
    fn grounding(&mut self, table: usize, rows: &Table) -> Result<(), EvalError> {
        const WANTED: &str =
            "x, y, width and height in pixels, four numbers of which the last two are above 0";
        rows.rows(&["answer", "bbox"], &["question_id"], &mut |cells| {
            let numbers = cells.numbers("bbox", WANTED)?;
            let [x, y, width, height] = numbers[..] else {
                return Err(cells.refuse("bbox", WANTED));
            };
            if width <= 0.0 || height <= 0.0 {
                return Err(cells.refuse("bbox", WANTED));
            }
            let corners = [x, y, x + width, y + height];
            let row = cells.row;
            for expression in cells.texts("answer")? {
                let asked = (expression, Truth::Box(corners));
                self.push(&cells, asked, None, PictureAt::Table { table, row });
            }
            Ok(())
        })
    }

    fn pope(&mut self, table: usize, rows: &Table) -> Result<(), EvalError> {
        let needed = ["question", "answer"];
        rows.rows(&needed, &["question_id", "id", "category"], &mut |cells| {
            let answer = cells.text("answer")?;
            let yes = match answer.trim().to_lowercase().as_str() {
                "yes" => true,
                "no" => false,
                _ => return Err(cells.refuse("answer", "yes or no")),
            };
            let (category, row) = (cells.name("category"), cells.row);
            let asked = (cells.text("question")?, Truth::Yes(yes));
            self.push(&cells, asked, category, PictureAt::Table { table, row });
            Ok(())
        })
    }

    fn text_vqa(&mut self, table: usize, rows: &Table) -> Result<(), EvalError> {
        rows.rows(&["question", "answers"], &["question_id"], &mut |cells| {
            let answers = cells.texts("answers")?;
            if answers.is_empty() {
                return Err(
                    cells.refuse("answers", "a list of one or more answers (test has none)")
                );
            }
            let asked = (cells.text("question")?, Truth::Answers(answers));
            let row = cells.row;
            self.push(&cells, asked, None, PictureAt::Table { table, row });
            Ok(())
        })
    }

    fn gqa(&mut self, rows: &Table, places: &BTreeMap<String, PictureAt>) -> Result<(), EvalError> {
        let needed = ["question", "answer", "imageId"];
        rows.rows(&needed, &["id"], &mut |cells| {
            let picture = places.get(&named(&cells, "imageId")?);
            let wanted = "the name of a picture of the other configuration (…_balanced_images)";
            let picture = picture.ok_or_else(|| cells.refuse("imageId", wanted))?;
            let asked = (
                cells.text("question")?,
                Truth::Answer(cells.text("answer")?),
            );
            self.push(&cells, asked, None, picture.clone());
            Ok(())
        })
    }
}

/// Reads encoded pictures, fastest in their order.
pub struct Pictures<'d> {
    tables: &'d [PathBuf],
    open: Option<(usize, Table)>,
}

impl Pictures<'_> {
    /// The bytes of a picture.
    pub fn read(&mut self, at: &PictureAt) -> Result<Vec<u8>, EvalError> {
        let (table, row) = match at {
            PictureAt::File(path) => return own::picture(path),
            PictureAt::Table { table, row } => (*table, *row),
        };
        let mut opened = match self.open.take() {
            Some((open, opened)) if open == table => opened,
            _ => Table::open(&self.tables[table])?,
        };
        let picture = opened.picture(row);
        self.open = Some((table, opened));
        picture
    }

    /// A place as people read it.
    pub fn describe(&self, at: &PictureAt) -> String {
        match at {
            PictureAt::File(path) => path.display().to_string(),
            PictureAt::Table { table, row } => {
                format!("{}, row {row}", self.tables[*table].display())
            }
        }
    }
}
