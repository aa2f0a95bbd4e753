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
metadata:
  labels:
    {{- include "kat-ray.nodeLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
spec:
  {{- if not (and $head $values.autoscaling.enabled) }}
  automountServiceAccountToken: false
  {{- end }}
  enableServiceLinks: false
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
        {{- include "kat-ray.env" $root | nindent 8 }}
        # `ray job stop` ends with SIGKILL after this many seconds; without it, after 3.
        - {name: RAY_JOB_STOP_WAIT_TIME_S, value: {{ add $grace 15 | quote }}}
      resources:
        {{- $limits := dict "cpu" (toString .size.cpus) "memory" .size.memory -}}
        {{- if .size.gpus }}{{ $limits = set $limits "nvidia.com/gpu" (toString .size.gpus) }}{{ end }}
        requests: {{- toYaml $limits | nindent 10 }}
        limits: {{- toYaml $limits | nindent 10 }}
      securityContext:
        {{- include "kat-ray.containerSecurity" $root | nindent 8 }}
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
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ $values.storage.tmpSize }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .size.shm }}}
    - name: cache
      emptyDir: {sizeLimit: {{ $values.storage.cacheSize }}}
    - name: runs
      persistentVolumeClaim: {claimName: {{ $values.storage.claim }}}
    - name: config
      configMap: {name: {{ $root.Release.Name }}}
    {{- with $values.storage.modelsClaim }}
    - name: models
      persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
    {{- end }}
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
{{- with .Values.hub.secretName }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: token}}
{{- end }}
{{- end -}}
