"""SQuAD: a question, the paragraph that answers it, and the other paragraphs of its article."""

from __future__ import annotations

from pathlib import Path

from qrag_retriever.errors import DatasetError
from qrag_train.data.passages import passage
from qrag_train.data.problems import Problems, read_json
from qrag_train.data.sample import SampleList, SupportSample


def read_squad(path: str | Path) -> SampleList:
    """Read a file in SQuAD's shape (also XQuAD): ``data`` → ``paragraphs`` → ``qas``.

    One chunk per paragraph of the article, with its title where it has one; the support is the
    question's own paragraph. Questions marked impossible (SQuAD 2.0) are left out.

    Args:
        path: The JSON file.

    Returns:
        One sample per question, in the file's order.

    Raises:
        DatasetError: If the file cannot be read or is not as described; names the articles.
    """
    content = read_json(path)
    articles = content.get("data") if isinstance(content, dict) else None
    if not isinstance(articles, list):
        raise DatasetError(
            f"{path} is not in SQuAD's shape (no list 'data'); give the official file, unpacked."
        )
    problems = Problems(path)
    samples = []
    for number, article in enumerate(articles):
        with problems.at(f"article {number}"):
            title = article.get("title", "")
            texts = [paragraph["context"] for paragraph in article["paragraphs"]]
            chunks = tuple(passage(title, t) if title else " ".join(t.split()) for t in texts)
            for place, paragraph in enumerate(article["paragraphs"]):
                for question in paragraph["qas"]:
                    if not question.get("is_impossible", False):
                        text = question["question"].strip()
                        first, *others = dict.fromkeys(a["text"] for a in question["answers"])
                        samples.append(
                            SupportSample(
                                question["id"], text, chunks, (place,), first, tuple(others)
                            )
                        )
    return problems.checked(samples)
