{{/* What all pods of Segue have in common. */}}

{{/* Of a pod; the level that Kubernetes calls restricted asks for these. */}}
{{- define "segue.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "segue.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "segue.podCommon" -}}
serviceAccountName: {{ include "segue.serviceAccount" . }}
automountServiceAccountToken: false
# Else a Service named segue-grpc would set SEGUE_GRPC_PORT.
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- include "segue.podSecurity" . | nindent 2 }}
{{- end -}}

{{/* Where a pool's, or the routers', pods may run. */}}
{{- define "segue.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* (list $ "router" its-values) */}}
{{- define "segue.spread" -}}
{{- $root := index . 0 -}}
topologySpreadConstraints:
{{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ $key }}
    maxSkew: 1
    whenUnsatisfiable: {{ (index $ 2).topologySpread.whenUnsatisfiable }}
    labelSelector:
      matchLabels: {{- include "segue.selector" $root | nindent 8 }}
        app.kubernetes.io/component: {{ index $ 1 }}
{{- end }}
{{- end -}}

{{/* Settings as environment: (dict "name" value ...) */}}
{{- define "segue.settingsEnv" -}}
{{- range $name, $value := . }}
- name: SEGUE_{{ upper $name }}
  {{- if kindIs "slice" $value }}
  value: {{ join "," $value | quote }}
  {{- else if and (kindIs "float64" $value) (eq $value (floor $value)) }}
  # Else large numbers would be written with an exponent.
  value: {{ $value | int64 | quote }}
  {{- else }}
  value: {{ $value | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The model, for whoever finds or fetches it. */}}
{{- define "segue.modelEnv" -}}
- {name: SEGUE_MODEL, value: {{ .Values.model.name | quote }}}
{{- if .Values.model.download }}
- {name: SEGUE_HOME, value: /models}
- {name: HF_HOME, value: /models/hub}
{{- else }}
- {name: SEGUE_HOME, value: /cache}
{{- end }}
- {name: HOME, value: /tmp}
{{- end -}}

{{/* What routers and workers need to know of the cluster. */}}
{{- define "segue.clusterEnv" -}}
{{ include "segue.modelEnv" . }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- with .Values.model.servedName }}
- {name: SEGUE_MODEL_NAME, value: {{ . | quote }}}
{{- end }}
- {name: SEGUE_CLUSTER_ID, value: {{ include "segue.fullname" . }}}
{{- if .Values.valkey.enabled }}
- name: VALKEY_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ include "segue.valkeySecret" . }}, key: password}}
- {name: SEGUE_REDIS, value: "redis://:$(VALKEY_PASSWORD)@{{ include "segue.fullname" . }}-valkey:6379/0"}
{{- else }}
- name: SEGUE_REDIS
  valueFrom: {secretKeyRef: {name: {{ .Values.redis.existingSecret }}, key: {{ .Values.redis.key }}}}
{{- end }}
- name: SEGUE_CLUSTER_SECRET
  valueFrom: {secretKeyRef: {name: {{ include "segue.clusterSecret" . }}, key: secret}}
{{- end -}}

{{- define "segue.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
- name: models
{{- if include "segue.modelClaim" . }}
  persistentVolumeClaim:
    claimName: {{ include "segue.modelClaim" . }}
    readOnly: {{ not .Values.model.download }}
{{- else }}
  emptyDir: {sizeLimit: {{ .Values.model.storage.size }}}
{{- end }}
{{- if not .Values.model.download }}
- name: cache
  emptyDir: {sizeLimit: 1Gi}
{{- end }}
{{- end -}}

{{- define "segue.volumeMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: models, mountPath: /models{{ if not .Values.model.download }}, readOnly: true{{ end }}}
{{- if not .Values.model.download }}
- {name: cache, mountPath: /cache}
{{- end }}
{{- end -}}

{{/* Gets the model ready before a container needs it: (list $ calibrate). Nothing where there is nothing to do. */}}
{{- define "segue.modelInit" -}}
{{- $root := index . 0 -}}
{{- $calibrate := index . 1 -}}
{{- if or $root.Values.model.download $calibrate }}
initContainers:
  - name: model
    image: {{ include "segue.image" $root }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    args: [segue, models, pull, {{ $root.Values.model.name | quote }}, {{ $calibrate | ternary "--calibrate" "--no-calibrate" }}]
    env:
      {{- include "segue.modelEnv" $root | nindent 6 }}
      {{- if $root.Values.model.hubToken.existingSecret }}
      - name: HF_TOKEN
        valueFrom: {secretKeyRef: {name: {{ $root.Values.model.hubToken.existingSecret }}, key: {{ $root.Values.model.hubToken.key }}}}
      {{- end }}
    resources: {{- toYaml $root.Values.model.resources | nindent 6 }}
    securityContext: {{- include "segue.containerSecurity" $root | nindent 6 }}
    volumeMounts: {{- include "segue.volumeMounts" $root | nindent 6 }}
{{- end }}
{{- end -}}

{{/* Whether a pool's workers need a calibrated model: (list $ its-values). Empty if not. */}}
{{- define "segue.isQuantized" -}}
{{- $engine := mergeOverwrite (deepCopy (index . 0).Values.engine) (index . 1).settings -}}
{{- range $name := list "quantization" "decode_quantization" -}}
{{- if and (hasKey $engine $name) (ne (index $engine $name) "none") -}}yes{{- end -}}
{{- end -}}
{{- end -}}
