{{- /*
A Ray pod: dict root, name (of the container), role, size (head or a worker group's values).
The root file system is read-only. What is written goes to volumes: /tmp (Ray's session and spilled objects), /dev/shm
(object store), /cache (home: hub and kernel caches), /runs (the run's directory).
*/ -}}
{{- define "kat-ray.pod" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $head := eq .role "head" -}}
{{- $grace := include "kat-ray.grace" $root | float64 | ceil | int -}}
{{- $all := $values.pods -}}
{{- $own := .size -}}
metadata:
  {{- with merge (dict) ($own.annotations | default dict) $all.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  labels:
    {{- include "kat-ray.nodeLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
spec:
  {{- if not (and $head $values.autoscaling.enabled) }}
  automountServiceAccountToken: false
  {{- end }}
  enableServiceLinks: false
  {{- range $field := list "serviceAccountName" "priorityClassName" "runtimeClassName" }}
  {{- with get $own $field | default (get $all $field) }}
  {{ $field }}: {{ . }}
  {{- end }}
  {{- end }}
  {{- with merge (dict) ($own.affinity | default dict) $all.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  restartPolicy: Never # the operator makes a new pod; a node that starts again in an old one is two nodes to Ray
  # The run's own grace, then Ray's kill, then the hook below gives up, then Ray itself ends: each a little later.
  terminationGracePeriodSeconds: {{ add $grace 60 }}
  securityContext:
    {{- include "kat-ray.podSecurity" $root | nindent 4 }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with .size.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if or .size.tolerations .size.gpus }}
  tolerations:
    {{- if .size.gpus }}
    - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}
    {{- end }}
    {{- with .size.tolerations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ .name }}
      image: {{ include "kat-ray.image" $root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      ports:
        {{- if $head }}
        - {containerPort: 6379, name: gcs-server}
        - {containerPort: 8265, name: dashboard}
        - {containerPort: 10001, name: client}
        - {containerPort: 44217, name: as-metrics}
        - {containerPort: 44227, name: dash-metrics}
        {{- end }}
        - {containerPort: 8080, name: metrics}
      env:
        {{- include "kat-ray.merged" (dict "ours" (include "kat-ray.env" $root) "given" (concat $all.env ($own.env | default list))) | nindent 8 }}
        # `ray job stop` ends with SIGKILL after this many seconds; without it, after 3.
        - {name: RAY_JOB_STOP_WAIT_TIME_S, value: {{ add $grace 15 | quote }}}
      {{- with concat $all.envFrom ($own.envFrom | default list) }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- $limits := dict "cpu" (toString .size.cpus) "memory" .size.memory -}}
        {{- range $name, $amount := $own.resources }}{{ $limits = set $limits $name (toString $amount) }}{{ end }}
        {{- if .size.gpus }}{{ $limits = set $limits "nvidia.com/gpu" (toString .size.gpus) }}{{ end }}
        requests: {{- toYaml $limits | nindent 10 }}
        limits: {{- toYaml $limits | nindent 10 }}
      securityContext:
        {{- include "kat-ray.containerSecurity" (merge (dict "ipcLock" (ternary $own.ipcLock $all.ipcLock (hasKey $own "ipcLock"))) $root) | nindent 8 }}
      {{- if or $head (eq .role "learner") }}
      # Ray ends at once with its pod. Before that: stop the job, and keep its learners until it has written a checkpoint.
      lifecycle:
        preStop:
          exec:
            command: [python, /etc/kat-ray/drain.py, {{ ternary "stop" "wait" $head }}, {{ add $grace 20 | quote }}]
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: cache, mountPath: /cache}
        - {name: runs, mountPath: /runs}
        - {name: config, mountPath: /etc/kat-ray, readOnly: true}
        {{- if $values.storage.modelsClaim }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
        {{- with concat $all.volumeMounts ($own.volumeMounts | default list) }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ $values.storage.tmpSize }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .size.shm }}}
    - name: cache
      emptyDir: {sizeLimit: {{ $values.storage.cacheSize }}}
    - name: runs
      {{- if $values.storage.claim }}
      persistentVolumeClaim: {claimName: {{ $values.storage.claim }}}
      {{- else }}
      emptyDir: {}
      {{- end }}
    - name: config
      configMap: {name: {{ $root.Release.Name }}}
    {{- with $values.storage.modelsClaim }}
    - name: models
      persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
    {{- end }}
    {{- with concat $all.volumes ($own.volumes | default list) }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- /*
The environment: the chart's, but for names that are given, then what is given, each name once, the last one.
dict ours (text, of a list), given (a list).
*/ -}}
{{- define "kat-ray.merged" -}}
{{- $by := dict -}}
{{- $names := list -}}
{{- range .given -}}
{{- if has .name (list "RAY_JOB_STOP_WAIT_TIME_S" "RAY_ADDRESS" "RAY_AUTH_MODE" "RAY_AUTH_TOKEN") -}}
{{- fail (printf "env: %s is set by the chart and the operator: use run.grace_seconds, auth.secretName" .name) -}}
{{- end -}}
{{- if and (hasKey . "value") (regexMatch "(?i)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$" .name) -}}
{{- fail (printf "env: %s has the name of a secret and a plain value: put it into a Secret, and give valueFrom.secretKeyRef" .name) -}}
{{- end -}}
{{- $_ := set $by .name . -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- $out := list -}}
{{- range .ours | fromYamlArray -}}
{{- if not (hasKey $by .name) }}{{ $out = append $out . }}{{ end -}}
{{- end -}}
{{- range uniq $names }}{{ $out = append $out (get $by .) }}{{ end -}}
{{- toYaml $out -}}
{{- end -}}

{{- define "kat-ray.env" -}}
- {name: HOME, value: /cache}
- {name: XDG_CACHE_HOME, value: /cache}
- {name: HF_HOME, value: /cache/huggingface}
- {name: VLLM_CACHE_ROOT, value: /cache/vllm}
- {name: TRITON_CACHE_DIR, value: /cache/triton}
- {name: TORCHINDUCTOR_CACHE_DIR, value: /cache/torchinductor}
- {name: TORCH_EXTENSIONS_DIR, value: /cache/torch_extensions}
- {name: FLASHINFER_WORKSPACE_BASE, value: /cache}
- {name: MPLCONFIGDIR, value: /cache/matplotlib}
- {name: CUDA_CACHE_PATH, value: /cache/nv}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
- {name: VLLM_USE_FLASHINFER_SAMPLER, value: "0"}
- {name: PYTHONUNBUFFERED, value: "1"}
{{- if .Values.hub.offline }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{ include "kat-ray.token" . }}
{{- end -}}

{{- define "kat-ray.token" -}}
{{- with .Values.hub.secretName -}}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: token}}
{{- end -}}
{{- end -}}
