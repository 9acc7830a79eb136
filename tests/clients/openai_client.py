"""What a user of OpenAI's own Python client does, against the cluster at the URL and with the key given.

Ends with an exception at the first answer that is not as it should be.
"""

import sys

import openai


def user(text):
    return [{"role": "user", "content": text}]


def check(client):
    model = client.models.list().data[0].id

    answer = client.chat.completions.create(
        model=model, messages=user("Translate to Swedish: vingt-trois"), temperature=0
    )
    assert answer.choices[0].message.content == "tjugotre", answer
    assert answer.choices[0].finish_reason == "stop", answer
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    stream = client.chat.completions.create(
        model=model,
        messages=user("Translate to Swedish: vingt-trois"),
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "tjugotre", text
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens, chunks[-1]

    scored = client.completions.create(
        model=model, prompt="Translate", max_tokens=2, logprobs=3, echo=True, temperature=0
    )
    logprobs = scored.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None and logprobs.token_logprobs[-1] <= 0, logprobs

    first, second = (
        client.completions.create(model=model, prompt="Translate to", seed=7, temperature=1.0)
        for _ in range(2)
    )
    assert first.choices[0].text == second.choices[0].text, (first, second)

    try:
        client.chat.completions.create(model="no-such-model", messages=user("x"))
    except openai.NotFoundError as error:
        assert error.param == "model", error
    else:
        raise AssertionError("an unknown model was accepted")
    try:
        client.chat.completions.create(model=model, messages=user("x"), temperature=3)
    except openai.BadRequestError as error:
        assert error.param == "temperature", error
    else:
        raise AssertionError("a temperature of 3 was accepted")


if __name__ == "__main__":
    url, key = sys.argv[1:]
    wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="mk_none", max_retries=0)
    try:
        wrong.models.list()
    except openai.AuthenticationError as error:
        assert error.code == "invalid_api_key", error
    else:
        raise AssertionError("a wrong key was accepted")
    check(openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0))
    print("ok")
