{{- define "kat-ray.name" -}}
{{- /* The operator refuses longer names: those that it derives from them are limited to 63. */ -}}
{{- $limit := ternary 47 53 (eq .Values.kind "job") -}}
{{- if gt (len .Release.Name) $limit -}}
{{- fail (printf "release name %q has %d characters: a %s takes at most %d" .Release.Name (len .Release.Name) (ternary "RayJob" "RayCluster" (eq .Values.kind "job")) $limit) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" .Release.Name) -}}
{{- fail (printf "release name %q: it must begin with a letter and hold only a-z, 0-9 and -" .Release.Name) -}}
{{- end -}}
{{- .Release.Name -}}
{{- end -}}

{{- define "kat-ray.labels" -}}
app.kubernetes.io/name: kat-ray
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "kat-ray.nodeLabels" -}}
{{- /* Of Ray's pods. Without app.kubernetes.io/name, which the operator sets to kuberay: by that value the Service that
it makes for a RayJob, NAME-head-svc, selects its head. */ -}}
{{- omit (include "kat-ray.labels" . | fromYaml) "app.kubernetes.io/name" | toYaml -}}
{{- end -}}

{{- define "kat-ray.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "kat-ray.grace" -}}
{{- /* run.grace_seconds: what a run that is told to end may take for its checkpoint. As kat-ray reads it: of the
overrides the last one counts, before the configuration. */ -}}
{{- $where := "run.config.run.grace_seconds" -}}
{{- $grace := dig "run" "grace_seconds" 60 .Values.run.config -}}
{{- range .Values.run.overrides -}}
{{- if hasPrefix "run.grace_seconds=" . -}}
{{- $where = "run.overrides: run.grace_seconds" -}}
{{- $grace = trimPrefix "run.grace_seconds=" . -}}
{{- end -}}
{{- end -}}
{{- if not (and (regexMatch "^[0-9]+([.][0-9]+)?$" (toString $grace)) (gt (float64 $grace) 0.0)) -}}
{{- fail (printf "%s = %v: seconds for a last checkpoint, a number above 0, written as 300 or 300.5" $where $grace) -}}
{{- end -}}
{{- $grace -}}
{{- end -}}

{{- define "kat-ray.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.userId }}
runAsGroup: {{ .Values.security.userId }}
fsGroup: {{ .Values.security.userId }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "kat-ray.containerSecurity" -}}
{{- /* The root context; with `ipcLock` in it: memory may be locked, for RDMA. */ -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: {{ .Values.security.userId }}
capabilities: {drop: [ALL]{{ if .ipcLock }}, add: [IPC_LOCK]{{ end }}}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "kat-ray.entrypoint" -}}
{{- $config := ternary "demo" "/etc/kat-ray/config.yaml" .Values.run.demo -}}
{{- $ours := list "run.dir=/runs" "cluster.address=auto" "cluster.by_role=true" -}}
{{- if .Values.run.demo -}}
{{- $ours = prepend $ours (printf "run.name=%s" .Release.Name) -}}
{{- end -}}
{{- if and (not .Values.storage.claim) (not (regexMatch "(^| )run\\.dir=[a-z0-9]+://" (join " " .Values.run.overrides))) -}}
{{- fail "storage.claim is empty: runs would be lost with their pods. Name a claim, or keep runs in a bucket: run.overrides: [run.dir=s3://my-bucket/runs]" -}}
{{- end -}}
kat-ray train {{ $config }} {{ concat $ours .Values.run.overrides | join " " }}
{{- end -}}
