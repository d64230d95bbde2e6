"""From raw logs to the data sets of the three stages, as in section 3.2 and appendix A.

python recipes/prepare.py --logs raw.jsonl.gz --out data
A line of a log is {"prompt", "user"} with the labels that it has: "response", or "completions" and
"ranks"; other names by --fields.prompt question and the like. It wants the libraries of
pip install 'trident[prepare]'. Values are the paper's where it states them.
"""

from engine.recipe import run_stage
from engine.settings.prepare import PrepareConfig

if __name__ == "__main__":
    run_stage("engine.prepare.prepare.prepare", PrepareConfig(), has_dry_run=False)
