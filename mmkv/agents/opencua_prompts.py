"""The prompts that OpenCUA was trained on, to the letter (xlang-ai/OpenCUA at 1d70f20, evaluation/agentnetbench, MIT)."""

from __future__ import annotations

GROUNDING = (
    "You are a GUI agent. You are given a task and a screenshot of the screen. You need to perform a series of pyautogui "
    "actions to complete the task."
)
_FORMAT = "\n\nFor each step, provide your response in this format:\n\n"

_OBSERVATION = """Observation:
  - Describe the current computer state based on the full screenshot in detail.\x20
  - Application Context:
    - The active application
    - The active window or page
    - Overall layout and visible interface
  - Key Elements:
    - Menu items and toolbars\x20
    - Buttons and controls
    - Text fields and content
    - Dialog boxes or popups
    - Error messages or notifications
    - Loading states
    - Other key elements
  - Describe any content, elements, options, information or clues that are possibly relevant to achieving the task goal, \
including their name, content, or shape (if possible).

"""
_OBSERVATION_SHORT = (
    "Observation: Describe the current computer state based on the full screenshot in detail. Provide any information that is "
    "possibly relevant to achieving the task goal and any elements that may affect the task execution, such as pop-ups, "
    "notifications, error messages, loading states, etc..\n\n"
)
_THOUGHT_SHORT = """Thought:
  - Step by Step Progress Assessment:
    - Analyze completed task parts and their contribution to the overall goal
    - Reflect on potential errors, unexpected results, or obstacles
    - If previous action was incorrect, predict a logical recovery step
  - Next Action Analysis:
    - List possible next actions based on current state
    - Evaluate options considering current state and previous actions
    - Propose most logical next action
    - Anticipate consequences of the proposed action
"""
_TYPING = """  - For Text Input Actions:
    - Note current cursor position
    - Consolidate repetitive actions (specify count for multiple keypresses)
    - Describe expected final text outcome
"""
_PERSON = "- Use first-person perspective in reasoning\n\n"
_ACTION_SHORT = "Action:\n  Provide clear, concise, and actionable instructions.\n\n"
_ACTION = """Action:
  Provide clear, concise, and actionable instructions:
  - If the action involves interacting with a specific target:
    - Describe target explicitly without using coordinates
    - Specify element names when possible (use original language if non-English)
    - Describe features (shape, color, position) if name unavailable
    - For window control buttons, identify correctly (minimize "—", maximize "□", close "X")
  - if the action involves keyboard actions like 'press', 'write', 'hotkey':
    - Consolidate repetitive keypresses with count
    - Specify expected text outcome for typing actions

"""
_FUNCTIONS = """Finally, output the action as PyAutoGUI code or the following functions:
- {"name": "computer.triple_click", "description": "Triple click on the screen", "parameters": {"type": "object", \
"properties": {"x": {"type": "number", "description": "The x coordinate of the triple click"}, "y": {"type": "number", \
"description": "The y coordinate of the triple click"}}, "required": ["x", "y"]}}
- {"name": "computer.terminate", "description": "Terminate the current task and report its completion status", "parameters": \
{"type": "object", "properties": {"status": {"type": "string", "enum": ["success", "failure"], "description": "The status of \
the task"}}, "required": ["status"]}}"""

_START = GROUNDING + _FORMAT
SYSTEM = {
    "l1": _START + _ACTION + _FUNCTIONS,
    "l2": _START + _THOUGHT_SHORT + _TYPING + "    " + _PERSON + _ACTION + _FUNCTIONS,
    "l3": _START + _OBSERVATION + _THOUGHT_SHORT + _TYPING + "  " + _PERSON + _ACTION + _FUNCTIONS + "\n",
    "l1_short": _START + _ACTION_SHORT + _FUNCTIONS,
    "l2_short": _START + _THOUGHT_SHORT + "\n" + _ACTION_SHORT + _FUNCTIONS,
    "l3_short": _START + _OBSERVATION_SHORT + _THOUGHT_SHORT + "\n" + _ACTION_SHORT + _FUNCTIONS,
    "grounding": GROUNDING,
}

INSTRUCTION = (
    "\n# Task Instruction:\n{instruction}\n\nPlease generate the next move according to the screenshot, task instruction and "
    "previous steps (if provided).\n"
)

STEP = "# Step {number}:\n"
HISTORY = {
    "action": "## Action:\n{action}\n",
    "thought": "## Thought:\n{thought}\n\n## Action:\n{action}\n",
    "observation": "## Observation:\n{observation}\n\n## Thought:\n{thought}\n\n## Action:\n{action}\n",
}
CODE = "\n## Code:\n{code}\n"
DETAIL = {
    "l1": "action",
    "l2": "thought",
    "l3": "observation",
}  # what is told before the code, where the code is told too
