"""`vlm-batch validate`: is a config fit to run; nothing is written."""

from __future__ import annotations

import click

from jobs.commands.common import config_options, emit, json_option, read_config


@click.command()
@config_options
@json_option
def command(config: str, sets: tuple[str, ...], as_json: bool, **short: str | None) -> None:
    """Check CONFIG against its model, input and run folder; write nothing.

    Reads config files of the model and footers of the input: seconds, whatever the input's size.
    """
    from jobs.job import Inputs
    from pipeline.models.family import check_inputs
    from pipeline.models.registry import family_for

    job_config = read_config(config, sets, **short)
    inputs = Inputs.open(job_config)
    family = family_for(inputs.checkpoint, job_config.model)
    check_inputs(family, job_config)
    resumes = inputs.check_run_folder()
    result = {
        "valid": True,
        "model": inputs.checkpoint.id,
        "family": family.name,
        "fused": family.fused,
        "rows": inputs.num_rows,
        "files": len(inputs.files),
        "columns": inputs.schema.names,
        "output": job_config.output.path,
        "run_folder": "resumes" if resumes else "new",
        "fingerprint": inputs.fingerprint.digest,
    }
    text = (
        f"{config} is valid: {inputs.num_rows} rows in {len(inputs.files)} files, model "
        f"{inputs.checkpoint.id} (family {family.name}), answers into {job_config.output.path} "
        f"({result['run_folder']}), columns {', '.join(inputs.schema.names)}"
    )
    emit(result, text, as_json)
