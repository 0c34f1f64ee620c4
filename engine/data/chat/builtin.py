"""The templates that come with the engine. ``{% generation %}`` encloses what the model writes, its end token included.

The layouts are those of Stanford Alpaca's prompts, of ChatML, and of OpenAI's Harmony as GPT-OSS renders it (tests
compare the text with the model's own template).
"""

from __future__ import annotations

ALPACA = """\
{%- set answered = namespace(yet=false) %}
{%- for message in messages %}
    {%- if message.role in ("system", "developer") %}
        {{- message.content }}
    {%- elif message.role == "user" %}
        {%- if loop.first %}
            {%- if message.input is defined %}
                {{- "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request." }}
            {%- else %}
                {{- "Below is an instruction that describes a task. Write a response that appropriately completes the request." }}
            {%- endif %}
        {%- endif %}
        {{- "\\n\\n### Instruction:\\n" }}
        {%- if message.instruction is defined and message.input is defined %}
            {{- message.instruction + "\\n\\n### Input:\\n" + message.input }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {%- if loop.nextitem is not defined or loop.nextitem.role != "user" %}
            {{- "\\n\\n### Response:\\n" }}
        {%- endif %}
    {%- elif message.role == "assistant" %}
        {%- if message.tool_calls is defined %}
            {{- raise_exception("the alpaca template knows no tool calls; take chatml, harmony or the model's own") }}
        {%- endif %}
        {%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- raise_exception("the alpaca template knows no role " + message.role) }}
    {%- endif %}
{%- endfor %}
"""  # noqa: E501

CHATML = """\
{%- set first = messages[0] %}
{%- if tools %}
    {{- "<|im_start|>system\\n" }}
    {%- if first.role in ("system", "developer") %}
        {{- first.content + "\\n\\n" }}
    {%- endif %}
    {{- "# Tools\\n\\nYou may call these functions:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" + tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nFor a call, answer with its JSON between tags:\\n<tool_call>\\n" }}
    {{- '{"name": <function-name>, "arguments": <arguments-object>}' + "\\n</tool_call><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- "<|im_start|>assistant\\n" }}
        {%- generation %}
            {%- if message.thinking is defined %}
                {{- "<think>\\n" + message.thinking + "\\n</think>\\n\\n" }}
            {%- endif %}
            {{- message.content }}
            {%- for call in message.tool_calls or [] %}
                {{- "\\n" if message.content or not loop.first else "" }}
                {{- '<tool_call>\\n{"name": ' + call.function.name | tojson + ', "arguments": ' }}
                {{- call.function.arguments | tojson + "}\\n</tool_call>" }}
            {%- endfor %}
            {{- "<|im_end|>" }}
        {%- endgeneration %}
        {{- "\\n" }}
    {%- elif message.role == "tool" %}
        {{- "<|im_start|>tool\\n" + message.content + "<|im_end|>\\n" }}
    {%- elif not (tools and loop.first and message.role in ("system", "developer")) %}
        {{- "<|im_start|>" + ("system" if message.role == "developer" else message.role) }}
        {{- "\\n" + message.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""

# A message without a channel was never said in Harmony: thinking goes to analysis, calls to commentary, the answer to
# final. Thinking of a turn that was answered is not seen again, so only the turn that is not yet over shows it.
HARMONY = """\
{%- macro type_of(spec, required) -%}
    {%- if spec.type == "array" -%}
        {%- if not spec["items"] -%}
            {{- "any[]" }}
        {%- elif spec["items"].type in ("string", "boolean") -%}
            {{- spec["items"].type + "[]" }}
        {%- elif spec["items"].type in ("number", "integer") -%}
            {{- "number[]" }}
        {%- else -%}
            {%- set inner = type_of(spec["items"], required) -%}
            {{- "any[]" if inner == "object | object" or inner | length > 50 else inner + "[]" }}
        {%- endif -%}
        {{- " | null" if spec.nullable else "" }}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string
            and spec.type is not mapping and spec.type[0] is defined -%}
        {{- spec.type | join(" | ") }}
    {%- elif spec.oneOf -%}
        {%- for variant in spec.oneOf -%}
            {{- type_of(variant, required) -}}
            {{- "// " + variant.description if variant.description else "" }}
            {{- "// default: " + variant.default | tojson if variant.default is defined else "" }}
            {{- "" if loop.last else " | " }}
        {%- endfor -%}
    {%- elif spec.type == "string" -%}
        {%- if spec.enum -%}
            {{- '"' + spec.enum | join('" | "') + '"' -}}
        {%- else -%}
            {{- "string | null" if spec.nullable else "string" }}
        {%- endif -%}
    {%- elif spec.type in ("number", "integer") -%}
        {{- "number" }}
    {%- elif spec.type == "boolean" -%}
        {{- "boolean" }}
    {%- elif spec.type == "object" and spec.properties -%}
        {{- "{\\n" }}
        {%- for name, one in spec.properties.items() -%}
            {{- name + ("" if name in (spec.required or []) else "?") + ": " }}
            {{- type_of(one, spec.required or []) }}
            {{- "" if loop.last else ", " }}
        {%- endfor -%}
        {{- "}" }}
    {%- elif spec.type == "object" -%}
        {{- "object" }}
    {%- else -%}
        {{- "any" }}
    {%- endif -%}
{%- endmacro -%}

{%- macro functions(tools) -%}
    {{- "## functions\\n\\nnamespace functions {\\n\\n" }}
    {%- for tool in tools %}
        {%- set called = tool.function %}
        {{- "// " + (called.description or "") + "\\ntype " + called.name + " = " }}
        {%- if called.parameters and called.parameters.properties %}
            {{- "(_: {\\n" }}
            {%- set required = called.parameters.required or [] %}
            {%- for name, spec in called.parameters.properties.items() %}
                {{- "// " + spec.description + "\\n" if spec.description else "" }}
                {{- name + ("" if name in required else "?") + ": " + type_of(spec, required) }}
                {%- if spec.default is defined %}
                    {%- if spec.enum %}
                        {{- ", // default: " + spec.default }}
                    {%- elif spec.oneOf %}
                        {{- "// default: " + spec.default }}
                    {%- else %}
                        {{- ", // default: " + spec.default | tojson }}
                    {%- endif %}
                {%- endif %}
                {{- ",\\n" }}
            {%- endfor %}
            {{- "}) => any;\\n\\n" }}
        {%- else %}
            {{- "() => any;\\n\\n" }}
        {%- endif %}
    {%- endfor %}
    {{- "} // namespace functions" }}
{%- endmacro -%}

{{- "<|start|>system<|message|>" }}
{{- (model_identity or "You are ChatGPT, a large language model trained by OpenAI.") }}
{{- "\\nKnowledge cutoff: 2024-06\\nCurrent date: " + strftime_now("%Y-%m-%d") }}
{{- "\\n\\nReasoning: " + (reasoning_effort or "medium") }}
{{- "\\n\\n# Valid channels: analysis, commentary, final. Channel must be included for every message." }}
{{- "\\nCalls to these tools must go to the commentary channel: 'functions'." if tools else "" }}
{{- "<|end|>" }}

{%- set told = messages[0].role in ("system", "developer") %}
{%- set turns = messages[1:] if told else messages %}
{%- if told or tools %}
    {{- "<|start|>developer<|message|>" }}
    {{- "# Instructions\\n\\n" + messages[0].content + "\\n\\n" if told else "" }}
    {{- "# Tools\\n\\n" + functions(tools) if tools else "" }}
    {{- "<|end|>" }}
{%- endif %}

{%- set called = namespace(name=none) %}
{%- for message in turns %}
    {%- if message.role == "user" %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- elif message.role == "tool" %}
        {%- if called.name is none %}
            {{- raise_exception("a tool's message follows no call") }}
        {%- endif %}
        {{- "<|start|>functions." + called.name + " to=assistant<|channel|>commentary<|message|>" }}
        {{- message.content | tojson + "<|end|>" }}
    {%- elif message.role == "assistant" and message.tool_calls %}
        {%- if message.tool_calls | length > 1 %}
            {{- raise_exception("harmony has one call a message; split them") }}
        {%- endif %}
        {%- if message.content and message.thinking %}
            {{- raise_exception("a call has either thinking or content, both would be its analysis") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {%- set thought = message.content or message.thinking %}
        {%- set answered = namespace(later=false) %}
        {%- for later in turns[loop.index:] if later.role == "assistant" and not later.tool_calls %}
            {%- set answered.later = true %}
        {%- endfor %}
        {{- "<|start|>assistant" }}
        {%- generation %}
            {%- if thought and not answered.later %}
                {{- "<|channel|>analysis<|message|>" + thought + "<|end|><|start|>assistant" }}
            {%- endif %}
            {{- " to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
            {{- call.arguments | tojson + "<|call|>" }}
        {%- endgeneration %}
        {%- set called.name = call.name %}
    {%- elif message.role == "assistant" %}
        {{- "<|start|>assistant" }}
        {%- set over = loop.last and not add_generation_prompt %}
        {%- generation %}
            {%- if over and message.thinking %}
                {{- "<|channel|>analysis<|message|>" + message.thinking + "<|end|><|start|>assistant" }}
            {%- endif %}
            {{- "<|channel|>final<|message|>" + message.content + ("<|return|>" if over else "<|end|>") }}
        {%- endgeneration %}
        {%- set called.name = none if not over else called.name %}
    {%- else %}
        {{- raise_exception("harmony knows a " + message.role + " message only at the start") }}
    {%- endif %}
{%- endfor %}
{{- "<|start|>assistant" if add_generation_prompt else "" }}
"""

TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML, "harmony": HARMONY}
# Without these tokens the model would have to spell its turns, and its end.
NEEDED = {
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "harmony": ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"),
}
