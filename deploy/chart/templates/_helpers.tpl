{{- define "tinsmith.labels" -}}
app.kubernetes.io/name: tinsmith
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "tinsmith.selector" -}}
app.kubernetes.io/name: tinsmith
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tinsmith.account" -}}
{{- if .Values.serviceAccount.create }}{{ default .Release.Name .Values.serviceAccount.name }}{{ else }}{{ default "default" .Values.serviceAccount.name }}{{ end }}
{{- end }}

{{- define "tinsmith.environment" -}}
envFrom:
  - secretRef:
      name: {{ .Values.secret }}
env:
  - {name: TINSMITH_OBJECTS, value: {{ .Values.objects | quote }}}
  - {name: TINSMITH_S3_ENDPOINT, value: {{ .Values.s3.endpoint | quote }}}
  - {name: TINSMITH_S3_REGION, value: {{ .Values.s3.region | quote }}}
  - {name: TINSMITH_S3_ENCRYPTION, value: {{ .Values.s3.encryption | quote }}}
  - {name: TINSMITH_S3_KMS_KEY, value: {{ .Values.s3.kmsKey | quote }}}
  - {name: TINSMITH_DATA_DIR, value: /data}
  - {name: TINSMITH_METRICS_PORT, value: "9100"}
  {{- range $name, $value := .Values.settings }}
  - {name: TINSMITH_{{ upper $name }}, value: {{ include "tinsmith.plain" $value | quote }}}
  {{- end }}
{{- end }}

{{/* Helm reads every number as a float, and would write 80000000000 as 8e+10. */}}
{{- define "tinsmith.plain" -}}
{{- if kindIs "float64" . }}{{ if eq . (floor .) }}{{ printf "%.0f" . }}{{ else }}{{ . }}{{ end }}{{ else }}{{ . }}{{ end }}
{{- end }}

{{/* What a base model's name becomes in a label, where no "/" may be; kubernetes-scale.sh does the same. */}}
{{- define "tinsmith.label" -}}
{{- . | replace "/" "_" }}
{{- end }}

{{- define "tinsmith.pod" -}}
serviceAccountName: {{ include "tinsmith.account" . }}
automountServiceAccountToken: false
{{- with .Values.images.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "tinsmith.container" -}}
imagePullPolicy: {{ .Values.images.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}
