"""A LangChain (LCEL) chain that answers a question from a book.

    python examples/langchain_rag.py
    python examples/langchain_rag.py --llm gpt-4o-mini
    python examples/langchain_rag.py --llm llama3.1 --base-url http://localhost:11434/v1

Without ``--llm`` a stand-in takes the model's place and quotes what it was given. A real one needs
``pip install langchain-openai``; it may be any server that speaks OpenAI's protocol.
"""

from __future__ import annotations

from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough

import book
from qrag_retriever.langchain import QRAGRetriever

PROMPT = ChatPromptTemplate.from_template(
    "Answer from these passages of a book alone, in one or two sentences.\n\n"
    "{passages}\n\nQuestion: {question}"
)


def main() -> None:
    parser = book.parser(__doc__)
    parser.add_argument("--llm", help="name of a chat model; left out: a stand-in")
    parser.add_argument("--base-url", help="address of the server, for models of your own")
    arguments = parser.parse_args()

    chunks = book.read_chunks(arguments.book)
    retriever = QRAGRetriever.from_texts(chunks, model=book.MODEL, k=4, show_progress=True)
    chain = (
        {"passages": retriever | join, "question": RunnablePassthrough()}
        | PROMPT
        | chat_model(arguments.llm, arguments.base_url)
        | StrOutputParser()
    )
    for piece in chain.stream(arguments.question):
        print(piece, end="", flush=True)
    print()


def join(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def chat_model(name: str | None, base_url: str | None) -> Runnable:
    if name is None:
        return RunnableLambda(quote)
    try:
        from langchain_openai import ChatOpenAI
    except ImportError:
        raise SystemExit("A real model needs: pip install langchain-openai") from None
    return ChatOpenAI(model=name, base_url=base_url, temperature=0)


def quote(prompt: PromptValue) -> str:
    return f"[stand-in for a language model; it was given]\n{prompt.to_string()}"


if __name__ == "__main__":
    main()
