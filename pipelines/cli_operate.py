"""The `caravan` commands for whoever runs the machines: what is wrong here, and manifests for Kubernetes."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict

import typer

from pipelines.screen import AddressOption, JsonOption, StoreOption, named_store, out, print_json

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(store: StoreOption = None, address: AddressOption = None, as_json: JsonOption = False) -> None:
    """Look whether this machine, the store and the cluster are fit for use; exit code 1 if something is not."""
    from cluster.head import caravan_home, temporary_folder
    from pipelines import doctor as machine
    from pipelines import doctor_cluster
    from pipelines.recipe import ServeConfig

    port = ServeConfig.model_fields["port"].default
    checks = machine.checks(caravan_home(), temporary_folder(), port)
    checks += doctor_cluster.checks(named_store(store), address)
    findings = []
    for finding in machine.examine(checks):
        findings.append(finding)
        if not as_json:
            out.print(f"[{_COLOURS[finding.state]}]{finding.state:4}[/] {finding.name:13}", end=" ")
            out.print(finding.found, markup=False, highlight=False, soft_wrap=True)
            if finding.remedy:
                out.print(f"{'':18} → {finding.remedy}", markup=False, highlight=False, soft_wrap=True)
    failed = any(finding.state == "fail" for finding in findings)
    if as_json:
        print_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    if machine.hangs():
        sys.stdout.flush()
        os._exit(1)
    if failed:
        raise typer.Exit(1)
