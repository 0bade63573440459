"""LangChain's tests of every chat model, against a server: run by test_other_clients.py alone."""

import os
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

QUOTE = 1  # in nano-qwq's vocabulary; so eager for it, its strings are empty, and end
beyond_nano = pytest.mark.xfail(reason="nano-qwq is too small to know what the call is to say")


class TestStandard(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "qwq-32b",
            "base_url": os.environ["QWQ_URL"],
            "api_key": "any",
            "max_retries": 0,
            "timeout": 120,
            "max_tokens": 300,
            "seed": 1,
            "logit_bias": {QUOTE: 100},
            "stream_usage": True,
            "extra_body": {"thinking_budget": 16},
        }

    test_tool_calling = beyond_nano(ChatModelIntegrationTests.test_tool_calling)
    test_tool_calling_async = beyond_nano(ChatModelIntegrationTests.test_tool_calling_async)
    test_bind_runnables_as_tools = beyond_nano(
        ChatModelIntegrationTests.test_bind_runnables_as_tools
    )
    test_agent_loop = beyond_nano(ChatModelIntegrationTests.test_agent_loop)
    test_unicode_tool_call_integration = beyond_nano(
        ChatModelIntegrationTests.test_unicode_tool_call_integration
    )
