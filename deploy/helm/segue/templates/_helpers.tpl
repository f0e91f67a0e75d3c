{{/* Names and labels. */}}
{{- define "segue.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "segue.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "segue.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "segue.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "segue.selector" -}}
app.kubernetes.io/name: {{ include "segue.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "segue.labels" -}}
{{ include "segue.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "segue.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "segue.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "segue.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end -}}

{{/* Names of Secrets and claims: those that are given, or the chart's own. */}}
{{- define "segue.valkeySecret" -}}
{{ .Values.valkey.existingSecret | default (printf "%s-valkey" (include "segue.fullname" .)) }}
{{- end -}}
{{- define "segue.clusterSecret" -}}
{{ .Values.clusterSecret.existingSecret | default (printf "%s-cluster" (include "segue.fullname" .)) }}
{{- end -}}
{{- define "segue.raySecret" -}}
{{ .Values.ray.existingSecret | default (printf "%s-ray" (include "segue.fullname" .)) }}
{{- end -}}
{{- define "segue.modelClaim" -}}
{{- if .Values.model.storage.create -}}
{{ include "segue.fullname" . }}-models
{{- else -}}
{{ .Values.model.storage.existingClaim }}
{{- end -}}
{{- end -}}

{{/* Tensor-parallel ranks of a pool's workers: (list $ "prefill"). */}}
{{- define "segue.ranks" -}}
{{- $root := index . 0 -}}
{{- $name := printf "%s_tp" (index . 1) -}}
{{- index (mergeOverwrite (dict $name 1) $root.Values.engine) $name -}}
{{- end -}}

{{/* What values.schema.json cannot say. */}}
{{- define "segue.validate" -}}
{{- if and .Values.valkey.enabled .Values.redis.existingSecret -}}
{{- fail "redis.existingSecret: set valkey.enabled to false as well, or leave it empty: there can only be one store" -}}
{{- end -}}
{{- if and (not .Values.valkey.enabled) (not .Values.redis.existingSecret) -}}
{{- fail "redis.existingSecret: without valkey.enabled it must name a Secret that holds the URL of a Redis" -}}
{{- end -}}
{{- if and .Values.model.storage.create .Values.model.storage.existingClaim -}}
{{- fail "model.storage.existingClaim: set model.storage.create to false as well, or leave it empty" -}}
{{- end -}}
{{- if and (not .Values.model.download) (not .Values.model.storage.existingClaim) -}}
{{- fail "model.storage.existingClaim: without model.download it must name a claim that holds the model" -}}
{{- end -}}
{{- if and (not .Values.model.download) (not (hasPrefix "/models/" .Values.model.name)) -}}
{{- fail "model.name: without model.download it must be a directory below /models, where the claim is mounted" -}}
{{- end -}}
{{- if and (or .Values.gateway.http .Values.gateway.grpc) (not .Values.gateway.parentRefs) -}}
{{- fail "gateway.parentRefs: must name the Gateway that the routes are for" -}}
{{- end -}}
{{- if and .Values.tls.clientAuth (not .Values.tls.existingSecret) -}}
{{- fail "tls.existingSecret: tls.clientAuth needs it, with a ca.crt" -}}
{{- end -}}
{{- if and .Values.apiKeys.existingSecret .Values.monitoring.serviceMonitor.enabled (not .Values.monitoring.serviceMonitor.apiKey.existingSecret) -}}
{{- fail "monitoring.serviceMonitor.apiKey.existingSecret: with apiKeys Prometheus needs a key as well, one that may observe" -}}
{{- end -}}
{{- if eq .Values.workers.mode "ray" -}}
{{- if not (.Capabilities.APIVersions.Has "ray.io/v1") -}}
{{- fail "workers.mode: ray needs the KubeRay operator, which this cluster does not have (with helm template: --api-versions ray.io/v1)" -}}
{{- end -}}
{{- if .Values.model.servedName -}}
{{- fail "model.servedName: segue up names the model itself; leave it empty under Ray" -}}
{{- end -}}
{{- range $pool := list "prefill" "decode" -}}
{{- if (index $.Values $pool).autoscaling.enabled -}}
{{- fail (printf "%s.autoscaling.enabled: the number of workers of a RayCluster is fixed; use workers.mode: statefulset" $pool) -}}
{{- end -}}
{{- if (index $.Values $pool).settings -}}
{{- fail (printf "%s.settings: under Ray all workers have those of `engine`; there are decode_* settings for decode" $pool) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $pool := list "prefill" "decode" -}}
{{- with (index $.Values $pool).autoscaling -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "%s.autoscaling.minReplicas: is above maxReplicas" $pool) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
