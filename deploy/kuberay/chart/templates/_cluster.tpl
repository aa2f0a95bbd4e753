{{- define "kat-ray.cluster" -}}
{{- $root := . -}}
rayVersion: {{ .Values.rayVersion | quote }}
authOptions:
  mode: token
  {{- with .Values.auth.secretName }}
  secretName: {{ . }}
  {{- end }}
enableInTreeAutoscaling: {{ .Values.autoscaling.enabled }}
{{- if .Values.autoscaling.enabled }}
autoscalerOptions:
  version: v2
  upscalingMode: {{ .Values.autoscaling.upscalingMode }}
  idleTimeoutSeconds: {{ .Values.autoscaling.idleTimeoutSeconds }}
  resources:
    requests: {{- toYaml .Values.autoscaling.resources | nindent 6 }}
    limits: {{- toYaml .Values.autoscaling.resources | nindent 6 }}
  securityContext:
    {{- include "kat-ray.containerSecurity" . | nindent 4 }}
  env:
    - {name: HOME, value: /tmp}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
{{- end }}
{{- if .Values.gcsFaultTolerance.enabled }}
gcsFaultToleranceOptions:
  redisAddress: {{ required "gcsFaultTolerance.redisAddress is empty: give it as redis://HOST:6379" .Values.gcsFaultTolerance.redisAddress }}
  {{- with .Values.gcsFaultTolerance.passwordSecret }}
  {{- if .name }}
  redisPassword:
    valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
  {{- end }}
  {{- end }}
{{- end }}
headGroupSpec:
  serviceType: ClusterIP
  rayStartParams: {}
  # No work on the head but the driver: what runs there takes the cluster down with it.
  resources: {CPU: "0", head: "1"}
  labels: {kat.ray/role: head}
  template:
    {{- include "kat-ray.pod" (dict "root" . "name" "ray-head" "role" "head" "size" .Values.head) | nindent 4 }}
workerGroupSpecs:
  {{- range $role, $group := .Values.workers }}
  {{- if and (not $root.Values.autoscaling.enabled) (or (ne $group.minReplicas $group.replicas) (ne $group.maxReplicas $group.replicas)) }}
  {{- fail (printf "workers.%s: without autoscaling minReplicas and maxReplicas must equal replicas (%v)" $role $group.replicas) }}
  {{- end }}
  {{- if gt (int $group.minReplicas) (int $group.maxReplicas) }}
  {{- fail (printf "workers.%s: minReplicas %v is larger than maxReplicas %v" $role $group.minReplicas $group.maxReplicas) }}
  {{- end }}
  - groupName: {{ $role }}
    replicas: {{ $group.replicas }}
    minReplicas: {{ $group.minReplicas }}
    maxReplicas: {{ $group.maxReplicas }}
    {{- if and $root.Values.autoscaling.enabled (hasKey $group "idleTimeoutSeconds") }}
    idleTimeoutSeconds: {{ $group.idleTimeoutSeconds }}
    {{- end }}
    rayStartParams: {}
    {{- $resources := dict "CPU" (toString $group.cpus) $role (toString $group.slots) }}
    {{- if $group.gpus }}{{ $resources = set $resources "GPU" (toString $group.gpus) }}{{ end }}
    resources: {{- toYaml $resources | nindent 6 }}
    labels: {kat.ray/role: {{ $role }}}
    template:
      {{- include "kat-ray.pod" (dict "root" $root "name" "ray-worker" "role" $role "size" $group) | nindent 6 }}
  {{- end }}
{{- end -}}
