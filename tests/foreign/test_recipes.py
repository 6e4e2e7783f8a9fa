"""The programs of docs/clients.md run as they stand, with the address of a running system in place of the usual one."""

import re
from pathlib import Path

import pytest

from tests.foreign.conftest import Served
from tests.reference import ROOT

pytestmark = pytest.mark.clients

PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
USUAL = "http://127.0.0.1:8000"


def recipe(section: str, language: str, served: Served) -> str:
    """The one program in that language."""
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    program: str
    (program,) = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    return program.replace(USUAL, served.url)


@pytest.mark.parametrize("section", ["openai, Python", "LangChain", "LiteLLM"])
def test_python_clients_give_the_text_whole_and_streamed(section: str, served: Served) -> None:
    out = served.run("python", "-c", recipe(section, "python", served))
    assert out.count(served.text) >= (1 if "lambda" in recipe(section, "python", served) else 2), out


def test_openai_for_javascript_gives_the_text_whole_and_streamed(served: Served, node: Path) -> None:
    program = node / "recipe.mjs"
    program.write_text(recipe("openai, JavaScript", "js", served), encoding="utf-8")
    out = served.run("node", program)
    assert out.count(served.text) == 2
    assert out.split()[-4:] == ["pocket", "pocket+manual", "pocket~facts", "pocket+manual~facts"]


def test_curl(served: Served) -> None:
    out = served.run("bash", "-euc", recipe("curl", "sh", served))
    assert '"finish_reason":"length"' in out
    assert out.rstrip().endswith("data: [DONE]")


def test_lm_eval_evaluates_one_s_own_texts(served: Served, tmp_path: Path) -> None:
    (tmp_path / "own_texts.yaml").write_text(recipe("lm-eval", "yaml", served), encoding="utf-8")
    texts = ['{"text": "Every setting of a service is a flag."}', '{"text": "A domain is a name that users select."}']
    (tmp_path / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")
    out = served.run("bash", "-euc", recipe("lm-eval", "sh", served), folder=tmp_path)
    assert re.search(r"bits_per_byte\s*\|.*\|\s*\d\.\d+", out), out


OWN_TASKS = {
    "own_answers": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list:
  - metric: exact_match""",
    "own_choices": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["{{answer}}", " nothing"]
doc_to_target: 0
metric_list:
  - metric: acc""",
}


def test_the_command_of_the_papers_question_answering_runs_with_tasks_of_one_s_own(
    served: Served, tmp_path: Path
) -> None:
    """As docs/paper.md has it, of either kind of task, with those that need a download replaced."""
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    (OPENAI_API_KEY=none lm_eval (?:.*\\\n)*.*)", page, flags=re.MULTILINE)
    for name, text in OWN_TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: questions.jsonl}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"{head}test_split: test\n{text}\n", encoding="utf-8")
    questions = ['{"question": "Every setting of a", "answer": " service"}', '{"question": "a", "answer": " b"}']
    (tmp_path / "questions.jsonl").write_text("\n".join(questions), encoding="utf-8")
    (tasks,) = re.findall(r"--tasks (\S+)", command)
    served.run("lm_eval", "validate", "--tasks", tasks)
    for given, ours in {
        tasks: ",".join(OWN_TASKS), USUAL: served.url, "NAME~facts": "pocket~facts", "CONTEXT": "512",
    }.items():  # fmt: skip
        assert given in command
        command = command.replace(given, ours)
    out = served.run("bash", "-euc", f"{command} --include_path .", folder=tmp_path)
    assert re.search(r"own_answers.*exact_match\s*\|.*\|\s*[01]", out), out
    assert re.search(r"own_choices.*acc\s*\|.*\|\s*[01]", out), out
