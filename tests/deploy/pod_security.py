"""Kubernetes' pod security standard."""

# Volumes that the `restricted` standard allows and the chart uses.
VOLUMES = {"emptyDir", "configMap", "persistentVolumeClaim"}


def restricted_errors(pod):
    """What Kubernetes' pod security standard `restricted` refuses, and a root file system that can be written."""
    spec = pod["spec"]
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield field
    for volume in spec["volumes"]:
        if not volume.keys() - {"name"} <= VOLUMES:
            yield f"volume {volume['name']}"
    for container in spec["containers"]:
        context = spec["securityContext"] | container.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield f"{container['name']}: runs as root"
        if context.get("allowPrivilegeEscalation", True):
            yield f"{container['name']}: allowPrivilegeEscalation"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container['name']}: capabilities"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{container['name']}: seccompProfile"
        if not context.get("readOnlyRootFilesystem"):
            yield f"{container['name']}: readOnlyRootFilesystem"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{container['name']}: hostPort"
