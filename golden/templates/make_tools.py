"""Writes tool_renders.json: chats with tools in every template of crates/text/tests/templates, by Jinja2.

    python make_tools.py > tool_renders.json     (needs `pip install jinja2==3.1.6`)

Six histories, as field-faults B19 asks: plain, system, tool schema, tool call, tool result, and several turns with
calls side by side.
"""

import json
import pathlib

from environment import Raised, compile_template

TEMPLATES = pathlib.Path(__file__).parent.parent.parent / "crates/text/tests/templates"
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a city, \"now\" <|im_end|> é <b>&</b>",
    "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "description": "The city"},
        "unit": {"type": "string", "enum": ["°C", "°F"]}}, "required": ["city"]}}}
PING = {"type": "function", "function": {
    "name": "ping", "description": "No arguments", "parameters": {"type": "object", "properties": {}}}}


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def call(identifier, name, arguments):
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


ASK = say("user", "Weather in Paris?")
PARIS = call("abcdef012", "get_weather", {"city": "Paris \"é\" <|im_end|>", "unit": "°C", "n": [1, 2.5, None, True, {"a": {}}]})
OSLO = call("abcdef013", "get_weather", {"city": "Oslo"})
NOTHING = call("abcdef014", "ping", {})
COLD = say("tool", "{\"t\": -3, \"note\": \"<|im_end|> 日本\"}", tool_call_id="abcdef013", name="get_weather")
WARM = say("tool", "21 °C", tool_call_id="abcdef012", name="get_weather")
PONG = say("tool", "", tool_call_id="abcdef014", name="ping")
TOOLS = [WEATHER, PING]
HISTORIES = {
    "plain": {"messages": [ASK]},
    "system": {"messages": [say("system", "Answer briefly."), ASK]},
    "tool schema": {"messages": [ASK], "tools": TOOLS},
    "tool call": {"messages": [ASK, say("assistant", "", tool_calls=[PARIS])], "tools": TOOLS},
    "tool result": {"messages": [ASK, say("assistant", "", tool_calls=[PARIS]), WARM], "tools": TOOLS},
    "result, no tools any more": {"messages": [ASK, say("assistant", "", tool_calls=[OSLO]), COLD]},
    "turns with calls side by side": {"messages": [
        say("system", "S"), ASK, say("assistant", "Both.", tool_calls=[PARIS, OSLO]), WARM, COLD,
        say("assistant", "21 and -3 °C"), say("user", "Ping"), say("assistant", "", tool_calls=[NOTHING]), PONG,
        say("assistant", "Done."), say("user", "Thanks")], "tools": TOOLS},
}

rows = []
for path in sorted(TEMPLATES.glob("*.jinja")):
    template = compile_template(path.read_text())
    for history, given in HISTORIES.items():
        row = {"template": path.stem, "history": history}
        try:
            row["text"] = template.render(
                messages=given["messages"], tools=given.get("tools"), documents=None, add_generation_prompt=True,
                bos_token="<s>", eos_token="</s>",
            )
        except Raised as error:
            row["raised"] = str(error)
        except Exception as error:  # what the language itself refuses; its words are Python's
            row["failed"] = type(error).__name__
        rows.append(row)
print(json.dumps({"histories": HISTORIES, "rows": rows}, ensure_ascii=False, indent=0))
