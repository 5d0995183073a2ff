"""Mistakes at every command: one line that names what is wrong and what to do, exit code 2, and nothing left behind.

One case for each rule. The rules of single keys are in config/test_config.py, those of a claims file in
analysis/test_claims.py, and those of a study's plan in sweeps/test_study.py.
"""

import shlex

import pytest
from helpers.hostile import snapshot

TRAIN = {
    # What is empty, or alone means nothing
    "an empty path": ("train.init_from=", "train.init_from=: is empty; give a text, or leave it out"),
    "a digest alone": ("train.init_digest=abc", "name the adapter with train.init_from=RUN"),
    "a sweeper without a sweep": ("hydra/sweeper=staged", "hydra/sweeper=staged: is for a sweep; add --multirun"),
    "a mapping of nothing": (
        "tying=RaSA 'tying.terms={ }'",
        "changes nothing; leave it out, or write tying.terms=null",
    ),
    "values without a sweep": ("seed=0,1", "seed=0,1: has several values; only train.py --multirun takes them"),
    "a flag that is none": ("--multirn seed=0,1", "--multirn: is no flag of train.py (did you mean --multirun?)"),
    "two flags that exclude each other": ("--multirun --cfg job", "Only one of --run, --multirun, --cfg"),
    "a knob without a method": ("tying.knob=r", "tying.knob: belongs to another method; set tying.method"),
    "compiled blocks on the disk": ("model.source=hub model.device_map=auto train.compile=always", "compile=always: "),
    "a limit of what is not spread": ("model.gpu_memory=20GiB", "set model.device_map=auto"),
    "no metric": ("score.metrics=[]", "score.metrics=[]: names no metric; null takes all"),
    # Sizes and rates
    "a budget out of reach": ("budget=1000000", "the nearest size of TABuv on this model has 3,360 parameters"),
    "a rate that falls upwards": ("train.lr=1e-3 train.min_lr=1e-2", "min_lr=0.01: is above train.lr=0.001; lower it"),
    "too few tokens": ("model.architecture.vocabulary=256", "vocabulary=256: a random model needs 257 or more"),
    "a memory of no unit": ("model.device_map=auto model.gpu_memory=20", "KiB, MiB or GiB, such as 20GiB"),
    "answers of the whole context": ("task.max_new_tokens=512", "leaves no room for a prompt in the model's context"),
    "prompts that fit nowhere": ("task.max_prompt_tokens=1", "none of 3810 rows fits max_prompt_tokens=1, "),
    "more rows than there are": ("task.rows.train=100000", "there are only 3810; lower it, or null takes all"),
    "all rows for validation": ("task.validation_from_train=3810", "must be less than the 3810 train rows"),
    "steps of no row": ("train.batch_tokens=1", "train.batch_tokens=1: the shortest training row has"),
    "rows of no number": ("'task.options.rows={train: few}'", "task.options.rows.train=few: must be a whole number"),
    # Parts of an adapter
    "nothing trained": (
        "tying.A.trained=false tying.B.trained=false tying.u.trained=false tying.v.trained=false",
        "none of A, B, u and v is trained; set tying.PART.trained=true",
    ),
    "arms without a sweep": ("arm=LoRA@r1,TA@r8", "has several values; only train.py --multirun takes them"),
    "a zero part at rate zero": ("train.lr_factor.v=0", "train.lr_factor.v=0: v starts at zero"),
    "layers backwards": ("tying.layers=[2-1]", "'2-1' is neither a layer's number nor a range"),
    # Methods of PEFT
    "no method": ("tying=peft", "tying=peft: names no method; add tying.method=NAME"),
    "a method that is none": ("tying=peft tying.method=VeraConf", "tying.method=VeraConf: is no method of PEFT"),
    "a method with steps of its own": ("tying=peft tying.method=AdaLoraConfig", "training loop here does not do"),
    "an argument that is none": ("tying=peft/vera tying.arguments.rank=3", "rank: VeraConfig has no such argument"),
    "a pattern that is none": ("tying=peft/vera 'tying.no_decay=[\"[\"]'", "is no regular expression"),
    "a knob that is no number": ("tying=peft/vera tying.knob=foo", "tying.knob=foo: is no whole number among"),
    "a factor of another method": ("tying=peft/vera train.lr_factor.A=2", "has no part A; use tying.lr_factors="),
    "a dropout of another method": ("tying=peft/vera tying.dropout=0.5", "has no effect on VeraConfig; set the"),
    "a quantised base": ("tying=peft/vera model.quantization=nf4", "needs the whole model, unquantised"),
    # Models and tasks
    "a model that is no folder": ("model.source=hub model.path=nowhere", "a folder with config.json, tokenizer.json"),
    "a random model in a folder": ("model.path=nowhere", "a random model is in no folder; leave it out, or set"),
    "a model of numbers": ("model=gpt2b_001", "this option is only for scripts/params.py"),
    "a random model of another kind": ("model.architecture.family=phi3", "a random model is one of llama, gpt2"),
    "a random model that is spread": ("model.device_map=auto", "a random model has no files to load; use null"),
    "a task's code that is none": ("task.kind=gsm9k", "task.kind=gsm9k: no such task; choose one of dialogsum"),
    "a stemmer of no kind": ("task=dialogsum task.options.use_stemmer=yes", "use_stemmer=yes: choose true or false"),
    "a field that is none": ("'task.prompt=\"{q}\"'", "the template needs the field 'q', which is missing"),
    "a prompt without a field": ("task.prompt=hello", "names no field of a row, so every prompt would be the same"),
    "an attribute for a field": ("'task.prompt=\"{question.upper}\"'", "the field 'question.upper', which is missing"),
    "targets of one row shuffled": ("task.shuffle_targets=true task.rows.train=1", "needs two training rows or more"),
    "a target of choices": ("task=hellaswag task.target=x", "task.target"),
    "an empty target": ("task.target=", "row 0: the target is empty"),
    "a template of no chat": ("task.chat_template=true", "this model's tokenizer has no chat template"),
    "an option of no task": ("+task.options.few=1", "few: task.kind=generated has no such option; its options: da"),
    "a key of a mapping": ("'task.options={zzz: 1}'", "is added as +task.options.zzz=VALUE"),
    "rows that are not there": ("task=squad data_root=nowhere", "nowhere/squad/train.jsonl: no such file"),
    # Scores and trackers
    "a metric that is none": ("score.metrics=[bleu]", "score.metrics=bleu: no such metric of task=chain_sum"),
    "a text of no kind": ("score.forgetting=wiki", "must be FILE.txt"),
    "a text that is no file": ("score.forgetting=wiki.txt", "no such file; a relative path starts at the present"),
    "another name of the embedded model": ("model=smollm2_135m model.name=a/b", "add model.source=hub (or "),
    "a team in the project": ("tracking=wandb tracking.project=a/b", "give the team as tracking.entity"),
}
SWEEPS = {
    "a step of zero": ("'seed=range(0,3,0)'", "seed=range(0,3,0): range() arg 3 must not be zero; give the values"),
    "an axis of nothing": ("'tying=glob(Z*)'", "tying=glob(Z*): has no value; give 1 to 100,000"),
    "an axis without end": ("'seed=range(0,1000000000)'", "has more than 100,000 values"),
    "cells without end": ("'seed=range(0,1000)' 'train.steps=range(5,1000)'", "has 995,000 cells, at most 100,000"),
    "an interval": ("'train.lr=interval(0,1)'", "give the values one by one, as in train.lr=1e-3,1e-2"),
    "grids with a comma": ("+grid=paper,quick", "+grid=paper,quick: grids are joined as '+grid=[NAME,NAME]'"),
    "an axis of Hydra's": ("hydra.job.name=a,b", "Sweeping over Hydra's configuration is not supported"),
    "an axis of empty mappings": ("tying=RaSA 'tying.terms={},null'", "tying.terms={}: an empty mapping is merged"),
    "an axis of one run": ("score.splits=[test],[validation]", "score.splits: does not change what a run is, so"),
    "an arm that is none": ("arm=LoRAx@r1,TA@r8", "tying=LoRAx rank.r=1: tying=LoRAx: no such option; choose one"),
    "a rank that is none": ("arm=LoRA@r1,TA@big", "arm=TA@big: must be TYING@rRANK, and several are an axis, as in"),
    "a rank beyond the model": ("arm=LoRA@r1,TA@r4000", "rank.r=4000: is more than a projection's smaller side"),
    "a list of arms": ("arm=[LoRA@r1,TA@r8]", "arm=[LoRA@r1,TA@r8]: must be TYING@rRANK, and several are an axis"),
    "arms with another rank": ("arm=LoRA@r1,TA@r8 rank=r2", "rank=r2: arm=LoRA@r1,TA@r8 says it already; leave one"),
    "an arm of two methods": ("tying=TAB arm=LoRA,TA", "tying=TAB: arm=LoRA,TA says it already; leave one of them"),
    "arms by another key": ("arms=LoRA@r1,TA@r8", "arms: unknown key; arms of different rank are an axis: arm=LoRA@"),
    "one cell that is wrong": ("seed=0,-1", "seed=-1: seed=-1: must be greater than or equal to 0"),
    "seeds as a range": ("seed=0-2", "Several are written seed=0,1,2 (--multirun)"),
    "seeds as a list": ("'seed=[0,1]'", "Several are written seed=0,1,2 (--multirun)"),
    "cells that are repeated": ("force=true", "force=true: a sweep that repeats finished cells could not be"),
    "claims of no file": ("hydra/sweeper=deciding hydra.sweeper.claims=[a]", "claims=['a']: must be a valid string"),
    "claims without their sides": ("hydra/sweeper=deciding train.lr=1e-3,1e-2", "needs TABuv r=8 and LoRA"),
    "claims without scores": ("hydra/sweeper=deciding tying=LoRA,TABuv score.splits=[]", "the claims need scores"),
    "fewer runs than the search has": (
        "hydra/sweeper=deciding tying=LoRA,TABuv hydra.sweeper.budget=1",
        "hydra.sweeper.budget=1: the search alone has 2 runs or more; raise",
    ),
}
WORDS = "model=tiny_llama outputs=outputs cache=cache"
SCRIPTS = {
    "a report of nothing": ("report.py nowhere", "nowhere: is not a folder; give the one with the runs"),
    "a report of no run": ("report.py empty", "empty: no run is there; give the folder with the runs (outputs="),
    "a report of a bare plan": ("report.py study", "the study has no runs yet; scripts/study.py run"),
    "a report with no claims": ("report.py outputs --claims nowhere", "nowhere: no such file; claims are YAML files"),
    "a report on another claim": ("report.py outputs --claims claims.yaml", "(did you mean TABuv?)"),
    "a report into no README": ("report.py outputs --readme nowhere.md", "nowhere.md"),
    "checks of no run": ("verify.py outputs", "outputs: is not a run's folder (it has no config.yaml); give a run"),
    "scores of no run": ("score.py outputs", "outputs: is not a run's folder (it has no config.yaml); give a run"),
    "checks of fewer than no rows": ("verify.py RUN --rows -1", "--rows -1: must be at least 0"),
    "scores of no metric": ("score.py RUN --metrics f1", "no such metric of task=chain_sum; choose from"),
    "answers of no run": ("generate.py outputs --prompt x", "is not a run's folder (it has no config.yaml)"),
    "answers of no token": ("generate.py RUN --max-new-tokens 0", "--max-new-tokens 0: must be at least 1"),
    "answers beyond the model": ("generate.py RUN --prompt x --max-new-tokens 100000", "at most the model's"),
    "answers of no text": ("generate.py RUN --prompt \udcff", "--prompt: has bytes that are no UTF-8; give the"),
    "an export to nowhere": ("export.py RUN --to peft --out ''", "--out: is empty; give a path, or leave it out"),
    "a cache of an unset variable": ("score.py RUN --cache=''", "--cache: is empty; give a path, or leave it out"),
    "an export over a file": ("export.py RUN --to peft --out claims.yaml", "exists and is not empty; remove it"),
    "numbers of an adapter": ("export.py RUN --to peft --dtype bfloat16", "--dtype bfloat16: is for --to merged"),
    "rows of a card": ("export.py RUN --to hub-card --split test", "--split test: is for --to peft or merged"),
    "parameters with a flag": ("params.py --foo", "--foo: params has no flags but --help; give KEY=VALUE"),
    "parameters of two at once": ("params.py tying=LoRA,TABuv", "tying=LoRA,TABuv: has several values"),
    "rows for nowhere": ("fetch_data.py task=squad", "data_root: has no value; give the folder to write to"),
    "rows of no data set": (
        "fetch_data.py task=rows data_root=rows",
        "task.hub.id: names no data set of the hub; give",
    ),
    "rows that are made": ("fetch_data.py task=chain_sum data_root=rows", "makes its own rows, so there is nothing"),
    "a path for a team": ("wandb_dashboard.py outputs --entity ../x --json", "--entity '../x': use letters, digits"),
    "a sweep that is not over": (f"sweep.py select {WORDS} seed=7", "1 of 1 cells are not finished"),
    "cells without a name": (f"sweep.py drop {WORDS}", "drop: name the cells by their ids, such as 'LoRA-*-s1-*'"),
    "cells that are none": (f"sweep.py retry {WORDS} 'LoRA-*'", "LoRA-*: is no cell of this sweep"),
    "cells of a sweep that has not begun": (
        f"sweep.py drop {WORDS} 'TABuv-*'",
        ": this sweep has not been started; train.py --multirun starts it",
    ),
    "two sweeps to watch": ("sweep.py watch one two", "watch: takes one sweep: its id, its name, its folder"),
    "no folder to look for a sweep": (
        "sweep.py status outputs=",
        "outputs=: is empty; give a path, or leave it out",
    ),
    "no sweep to watch": ("sweep.py watch outputs=outputs", "has no sweeps/; start one with train.py --multirun"),
    "an option of another action": (f"sweep.py status {WORDS} --no-test", "--no-test: is for select; status"),
    "a study of nowhere": ("study.py plan nowhere", "no such file; a study is a folder with a study.yaml"),
    "words for a plan": ("study.py plan study seed=1", "seed=1: plan takes no words; change study.yaml instead"),
    "a part that is none": ("study.py plan study --part two", "two: is no part of study; its parts are one"),
    "a part of the records": ("study.py export study --part one", "--part: is for plan, forecast and run; export"),
    "a plan that is not committed": ("study.py run study", "is not committed; commit the plan before the first run"),
    "records of no run": ("study.py export study --outputs nowhere", "so there are no runs to export"),
    "records that are not there": ("study.py restore study", "the study has no runs yet; scripts/study.py run"),
    "two runs to repeat": ("study.py repeat study a b", "repeat: takes one run; give its id"),
    "a run that is none": (
        "study.py verify study a",
        "the study has no runs yet; scripts/study.py run study makes them",
    ),
}
COMMANDS = {
    **{what: (f"../train.py {words}", says) for what, (words, says) in TRAIN.items()},
    **{what: (f"../train.py --multirun {words}", says) for what, (words, says) in SWEEPS.items()},
    **SCRIPTS,
}


@pytest.fixture
def place(tmp_path, monkeypatch, finished_run):
    """A folder with a finished run, an empty folder, a study without runs, and claims about what does not exist."""
    finished_run()
    (tmp_path / "empty").mkdir()
    (tmp_path / "study").mkdir()
    part = "{name: one, words: [model=tiny_llama], sweeps: [[seed=0]]}"
    (tmp_path / "study" / "study.yaml").write_text(f"name: study\nwords: []\nparts: [{part}]\n")
    sides = "method: {configuration: TABvu, rank: 8}, comparator: {configuration: LoRA, at: equal_rank}"
    (tmp_path / "claims.yaml").write_text(f"claims: [{{name: x, {sides}, retains: 0.9, tasks: []}}]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("what", COMMANDS)
def test_a_mistake_is_one_line_and_leaves_nothing(what, place, script):
    line, says = COMMANDS[what]
    (run,) = (place / "outputs").glob("TABuv-*")
    path, *words = [str(run) if word == "RUN" else word for word in shlex.split(line)]
    if path == "../train.py":
        flags = words[:1] if words[0].startswith("--m") else []
        words = [*flags, "tracking=none", *WORDS.split(), *words[len(flags) :]]
    before = snapshot(place)
    code, out, err = script(f"scripts/{path}", *words)
    assert says in err
    assert (code, out, len(err.splitlines()), err[:7]) == (2, "", 1, "error: ")
    after = snapshot(place)
    # The cache remembers digests of rows.
    assert before == {name: held for name, held in after.items() if not name.startswith("cache")}
